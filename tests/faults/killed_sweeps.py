"""Sweeps that are trained in company while their trainers and workers are killed at random lines.

    python -m tests.faults.killed_sweeps --kills 50 --seed 1

Every job ends once, with every byte of its weights, every metric and every step of an undisturbed run. The suite does a
short run of it. A trainer's lines are its messages and the steps of its commits, those of a fork that trains members
for it (on the path `fused`) what it sends to it, a worker's its statements to the database. The jobs of a worker that
is killed are trained together again; those of a trainer that is killed are trained alone from then on, so that each
sweep has one such death at the most before its last.
"""

import argparse
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from nanomoe.config import JobConfig
from service.database import migrate
from service.database.opening import open_database
from service.database.schema import table
from service.jobs import reads, sweeps
from service.jobs.claim_order import jobs as job_table
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.numbered_events import EventFilter, EventReader
from service.jobs.statuses import TERMINAL
from service.jobs.submit import submit_sweep
from service.jobs.tables import Job, Worker
from service.settings import Settings
from tests.faults.next_death import NextDeath
from tests.faults.undisturbed import (
    DENSE,
    TEXT,
    Undisturbed,
    assert_undisturbed,
    hooked,
    train_stacked,
    train_undisturbed,
)
from tests.worker.workplace import QUICK, WorkerProcess, Workplace

GRID = [DENSE | {"epochs": 20, "lr": lr, "seed": seed} for lr in (1e-3, 3e-3, 5e-3) for seed in (1, 2)]
N_STEPS = 60
TIMING = replace(QUICK, record=0.2)
OF_A_SWEEP = ("worker", "worker", "trainer")
"""Who is killed while a sweep is trained, before one more that is drawn by lot. Where a cohort has forks, one of them
dies in place of every other trainer: its trainer dies of that."""

MOST_LINES = {"trainer": 400, "fork": 60, "worker": 250}
"""Lines from which the next death is drawn: about those of a sweep that is left alone."""


@cache
def expected(path: str | None) -> list[Undisturbed]:
    """What each job must end with that is trained in this way, by itself or among all of them."""
    configs = [JobConfig(**config) for config in GRID]
    return train_stacked(configs) if path == "stacked" else [train_undisturbed(config, path=path) for config in configs]


@dataclass
class Report:
    """What has happened."""

    kills: Counter[str] = field(default_factory=Counter)
    """By who was killed, and whether it had a cohort then."""
    missed: int = 0
    """Orders to die that came too late: the sweep ended first."""
    sweeps: int = 0
    attempts: int = 0


class KilledSweeps:
    """A worker, and the chance that befalls it and its trainers."""

    def __init__(self, place: Workplace, *, seed: int, path: str | None = None) -> None:
        """`path`: as of `hooked`."""
        self._place, self._path = place, path
        self._dying_trainers = ("trainer", "fork") if path == "fused" else ("trainer",)
        self._chance = random.Random(seed)  # noqa: S311 - the same deaths every time
        folder = place.settings.data_dir.parent
        self._files = {who: folder / f"next_death_of_a_{who}" for who in MOST_LINES}
        self._deaths = {who: NextDeath(file) for who, file in self._files.items()}
        self._worker = self._start()
        self.report = Report()

    def _start(self) -> WorkerProcess:
        return self._place.start_worker(
            program=hooked({}, self._path, {who: self._files[who] for who in self._dying_trainers}),
            death=self._files["worker"],
            cohort=len(GRID),
            slots=2,
            timing=TIMING,
            max_crashes=100,
            snapshot_seconds=0.05,
        )

    def run(self, n_kills: int) -> Report:
        """Kill so often, over as many sweeps as that takes. Raises AssertionError for whatever that has broken."""
        victims: Sequence[str] = ()
        while left := n_kills - sum(self.report.kills.values()):
            if not victims:
                victims = [*self._of_a_sweep(), self._chance.choice(["trainer", "worker"])][:left]
            victims = self._train_and_kill(victims)
        return self.report

    def _of_a_sweep(self) -> Sequence[str]:
        kinds = self._dying_trainers
        return [*OF_A_SWEEP[:-1], kinds[-1 - self.report.sweeps % len(kinds)]]

    def _train_and_kill(self, victims: Sequence[str]) -> Sequence[str]:
        """Train a sweep, and kill these one after the other. Returns those who outlived it."""
        place = self._place
        shape: dict[str, Any] = {"cohort_key": "one", "total_steps": N_STEPS}
        jobs = [NewJob(text=TEXT, config=JobConfig(**config).model_dump(mode="json"), **shape) for config in GRID]
        sweep, _ = submit_sweep(place.db, NewSweep(jobs=jobs, config=DENSE, parameters=[]))
        outlived: Sequence[str] = ()
        for n, victim in enumerate(victims):
            in_company = place.wait_until(lambda: self._in_company(sweep.id))
            running = self._running(sweep.id)
            self._deaths[victim].order(self._chance.randint(1, MOST_LINES[victim]))
            place.wait_until(lambda victim=victim: self._deaths[victim].happened() or self._has_ended(sweep.id))  # type: ignore[misc]
            if self._deaths[victim].withdraw():
                self.report.missed += 1
                outlived = victims[n:]
                break
            self.report.kills[f"{victim} {in_company}"] += 1
            if victim == "worker":
                self._replace_worker()
            place.wait_until(lambda running=running: not running or running - self._running(sweep.id))  # type: ignore[misc]
        place.wait_until(lambda: self._has_ended(sweep.id))
        self._judge(sweep.id)
        return outlived

    def _in_company(self, sweep_id: str) -> str | None:
        """Whether jobs of the sweep are trained together, in words; None while none is trained."""
        running = [job for job in self._jobs(sweep_id) if job.status in {"running", *TERMINAL}]
        if not running:
            return None
        return "in company" if any(job.status == "running" and job.cohort_id for job in running) else "alone"

    def _running(self, sweep_id: str) -> set[tuple[str, int]]:
        """Id and fence of each job that runs."""
        return {(job.id, job.fence) for job in self._jobs(sweep_id) if job.status == "running"}

    def _has_ended(self, sweep_id: str) -> bool:
        return sweeps.has_ended(self._place.db, sweep_id)

    def _jobs(self, sweep_id: str) -> list[Job]:
        ids = sweeps.get_sweep(self._place.db, sweep_id)[2].job_ids
        return [reads.get_job(self._place.db, job_id) for job_id in ids]

    def _replace_worker(self) -> None:
        """Start another, for which the leases of the one that died have run out."""
        assert self._worker.wait(60) is not None
        workers = table(Worker)
        gone = sa.select(workers.c.id).where(workers.c.pid == self._worker.pid)
        with self._place.db.write() as session:
            session.execute(
                sa.update(workers).where(workers.c.pid == self._worker.pid).values(stopped_at=self._place.db.now)
            )
            held = sa.update(job_table).where(job_table.c.status == "running", job_table.c.worker_id.in_(gone))
            session.execute(held.values(lease_until=sa.literal(1)))
        self._worker = self._start()

    def _judge(self, sweep_id: str) -> None:
        place, jobs = self._place, self._jobs(sweep_id)
        told, _ = EventReader(place.db, EventFilter(sweep_id=sweep_id), 0).read()
        for n, job in enumerate(jobs):
            assert job.status == "succeeded", place.describe()
            assert job.execution is not None
            numbers = expected(None if self._path is None else job.execution["path"])[n]
            assert [status for status in place.statuses(job) if status in TERMINAL] == ["succeeded"]
            assert_undisturbed(place, job, numbers)
            of_job = [event.data["status"] for event in told if event.job_id == job.id and event.kind == "status"]
            assert of_job == place.statuses(job)
        self.report.sweeps += 1
        self.report.attempts += sum(job.attempt for job in jobs)


def main() -> None:
    """Run, and print what has happened as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--path",
        choices=["eager", "fused", "stacked"],
        default="eager",
        help="eager: in turns; fused: by forks, one a core; stacked: as one program, as on a GPU",
    )
    parser.add_argument("--database-url", help="an empty PostgreSQL database; else SQLite")
    options = parser.parse_args()
    os.environ["NANOMOE_STEP_PATH"] = "eager" if options.path == "stacked" else options.path
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.path == "stacked":  # torch is imported only now: it reads the number of its threads as it is
        from nanomoe.training.steps.choice import CAPTURING
        from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs

        CAPTURING["cpu"] = RecordedGraphs
    with tempfile.TemporaryDirectory() as folder:
        given = {"data_dir": Path(folder) / "data", "database_url": options.database_url}
        settings = Settings(_env_file=None, **{name: value for name, value in given.items() if value is not None})
        db = open_database(settings)
        migrate.upgrade(db)
        place = Workplace(db, settings)
        try:
            killed = KilledSweeps(place, seed=options.seed, path=options.path)
            killed.run(options.kills)
        finally:
            place.end()
            db.close()
        print(json.dumps(vars(killed.report), indent=1))


if __name__ == "__main__":
    main()
