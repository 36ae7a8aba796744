"""A soak: jobs and sweeps arrive while the API, the workers and their trainers are killed and stopped at random. All
workers but the first train jobs of one shape together.

    python -m tests.faults.soak

Whatever dies, and whenever: every job reaches a terminal state exactly once and, unless it was cancelled, succeeds with
the bytes, metrics and steps of an undisturbed run; no process is left, no file without a row after the sweep, and the
database is whole. The suite does a short run of it.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import sqlalchemy as sa

from nanomoe.config import JobConfig
from nanomoe.store.local import LocalStore
from service.client import Client, ClientError, SweepHandle
from service.database import migrate
from service.database.opening import open_database
from service.jobs import reads
from service.jobs.statuses import TERMINAL
from service.jobs.workers import list_workers
from service.settings import Settings
from service.storage import orphans
from tests.faults.undisturbed import Undisturbed, assert_undisturbed, train_undisturbed
from tests.worker.workplace import QUICK, WorkerProcess, Workplace, is_alive
from worker.survivors import TOKEN_VARIABLE

ROOT = Path(__file__).parents[2]
TEXT = "A chuva caiu a noite toda sobre o telhado de zinco, e de manhã o quintal era um lago de barro. " * 2
CONFIG: dict[str, Any] = {
    "tokenizer": "bytes", "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 32, "batch_size": 2, "epochs": 60,
    "lr": 3e-3, "cont_max_new_tokens": 5,
}  # fmt: skip
SEEDS = range(4)
EACH_SWEEP = 4
"""Of so many submissions the first is a sweep over all seeds."""
TIMING = replace(QUICK, lease=3.0, heartbeat=0.5, rescue=1.0, cancel_grace=2.0)


@dataclass
class Report:
    """What a soak has seen."""

    jobs: Counter[str] = field(default_factory=Counter)
    """By terminal status, or by the code of an error that so many faults may end in."""
    faults: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    together: int = 0
    """Jobs whose last attempt was in company."""
    seconds: float = 0.0
    orphans_swept: int = 0


@cache
def expected(seed: int, path: str) -> Undisturbed:
    """What a job must end with that was trained in this way: those that come while loops are compiled go on without."""
    return train_undisturbed(JobConfig(**CONFIG, seed=seed), TEXT, path)


class Soak:
    """The processes, and the chance that befalls them."""

    def __init__(self, place: Workplace, *, workers: int, seed: int, cohort: int = len(SEEDS)) -> None:
        """`cohort`: most jobs that a trainer trains together, but those of the first worker."""
        self.place = place
        self.cohort = cohort
        self.chance = random.Random(seed)  # noqa: S311 - the same faults every time
        self.report = Report()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.api = self._start_api()
        self.workers = [self._start_worker(n) for n in range(workers)]
        self.stopped: list[tuple[float, int]] = []
        """(when to continue, process)"""
        self.submissions = 0
        self.submitted: list[str] = []
        self.cancelled: set[str] = set()
        """Of which it was asked that they be cancelled, with whatever answer."""

    def _start_api(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "NANOMOE_DATA_DIR": str(self.place.settings.data_dir),
            "NANOMOE_DATABASE_URL": self.place.settings.database_url,
            "NANOMOE_PORT": str(self.port),
        }
        return subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def _start_worker(self, number: int) -> WorkerProcess:
        return self.place.start_worker(
            device=f"cpu:{number}",
            timing=TIMING,
            snapshot_seconds=0.3,
            backoff_seconds=1.0,
            max_crashes=10,
            cohort=self.cohort if number else 1,
        )

    def run(self, n_jobs: int, seconds: float) -> Report:
        """Submit `n_jobs` jobs over 80 % of `seconds`, with a fault about every second until then, and wait until all
        have ended."""
        began = time.monotonic()
        fault_due = began + 5
        with Client(f"http://127.0.0.1:{self.port}", timeout=10, retries=0) as client:
            while len(self.submitted) < n_jobs or not self._all_ended():
                now = time.monotonic()
                assert now < began + 10 * seconds + 600, f"not done: {self.place.describe()}"
                if len(self.submitted) < n_jobs and now >= began + len(self.submitted) * 0.8 * seconds / n_jobs:
                    self._submit(client, n_jobs)
                if now >= fault_due and now < began + seconds:
                    fault_due = now + self.chance.uniform(0.3, 2.0)
                    self._do_harm(now)
                self._mend(now)
                time.sleep(0.1)
        self.report.seconds = time.monotonic() - began
        return self.report

    def _submit(self, client: Client, n_jobs: int) -> None:
        """A job, or a sweep, of which nothing or all is cancelled, or one job."""
        n, key = self.submissions, f"soak-{self.submissions}"
        seed = SEEDS[n % len(SEEDS)]
        is_sweep = n % EACH_SWEEP == 0 and n_jobs - len(self.submitted) >= len(SEEDS)
        try:
            made = (
                client.sweep(TEXT, CONFIG | {"seed": SEEDS[0]}, seeds=len(SEEDS), idempotency_key=key)
                if is_sweep
                else client.submit(TEXT, CONFIG | {"seed": seed}, idempotency_key=key)
            )
        except ClientError:
            return  # the API is dead or stopped; the key makes the next try safe, whatever became of this one
        job_ids = list(made.job_ids or ()) if isinstance(made, SweepHandle) else [made.id]
        self.submissions += 1
        self.submitted += job_ids
        if self.chance.random() < 0.05:
            unwanted = self.chance.choice([job_ids, [self.chance.choice(job_ids)]])
            self.cancelled.update(unwanted)
            try:
                made.cancel() if unwanted is job_ids else client.job(unwanted[0]).cancel()
            except ClientError:
                return

    def _all_ended(self) -> bool:
        counts = reads.count_jobs(self.place.db)
        return sum(counts[status] for status in TERMINAL) == len(self.submitted)

    # -- Harm ------------------------------------------------------------------------------------------------------

    def _do_harm(self, now: float) -> None:
        kind = self.chance.choice(["trainer", "trainer", "worker", "api"])
        fault = self.chance.choice(["kill", "stop"])
        victims = {
            "api": [self.api.pid],
            "worker": [worker.pid for worker in self.workers],
            "trainer": [child.pid for worker in self.workers for child in _children(worker.pid)],
        }[kind]
        if not victims:
            return
        victim = self.chance.choice(victims)
        if any(victim == stopped for _, stopped in self.stopped):
            return
        try:
            psutil.Process(victim).send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        except psutil.NoSuchProcess:
            return
        self.report.faults[f"{fault} {kind}"] += 1
        if fault == "stop":
            self.stopped.append((now + self.chance.uniform(0.1, 6.0), victim))

    def _mend(self, now: float) -> None:
        self._continue_all(now)
        if self.api.poll() is not None:
            self.api = self._start_api()
        for n, worker in enumerate(self.workers):
            if worker.wait(0) is not None:
                self.workers[n] = self._start_worker(n)

    def _continue_all(self, now: float) -> None:
        for until, pid in self.stopped.copy():
            if until <= now:
                self.stopped.remove((until, pid))
                if is_alive(pid):
                    psutil.Process(pid).send_signal(signal.SIGCONT)

    # -- Judgement -------------------------------------------------------------------------------------------------

    def _can_be_stopped(self) -> bool:
        """Whether everybody lives and has come so far that a signal ends it cleanly."""
        present = {worker.pid for worker, _ in list_workers(self.place.db)}
        if any(worker.wait(0) is not None or worker.pid not in present for worker in self.workers):
            return False
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def judge(self) -> None:
        """Raises AssertionError for whatever a fault has broken."""
        place = self.place
        while not self._can_be_stopped():
            self._mend(float("inf"))
            time.sleep(0.1)
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        self.api.send_signal(signal.SIGTERM)
        for worker in self.workers:
            assert worker.wait(60) == 0
        assert self.api.wait(60) == 0
        assert trainers_of(place) == [], "a trainer is left"
        jobs = [reads.get_job(place.db, job_id) for job_id in self.submitted]
        assert len({job.id for job in jobs}) == len(jobs)
        assert sum(reads.count_jobs(place.db).values()) == len(jobs), "a submission was doubled"
        for job in jobs:
            ends = [status for status in place.statuses(job) if status in TERMINAL]
            assert ends == [job.status], f"{job.id} ended {ends}"
            self.report.attempts += job.attempt
            self.report.together += job.cohort_size is not None
            if job.status == "succeeded":
                assert job.execution is not None
                assert_undisturbed(place, job, expected(job.config["seed"], job.execution["path"]))
                self.report.jobs["succeeded"] += 1
            elif job.status == "cancelled":
                assert job.id in self.cancelled, f"nobody has cancelled {job.id}"
                self.report.jobs["cancelled"] += 1
            else:
                assert job.error is not None
                assert job.error["code"] == "crashed_repeatedly", f"{job.id} failed: {job.error}"
                self.report.jobs["crashed_repeatedly"] += 1
        swept = orphans.sweep_orphans(place.db, LocalStore(place.settings.data_dir), older_than=timedelta(0))
        self.report.orphans_swept = len(swept)
        assert orphans.find_orphans(place.db, LocalStore(place.settings.data_dir)) == []
        if place.db.is_sqlite:
            with place.db.read() as session:
                assert session.connection().execute(sa.text("PRAGMA integrity_check")).scalar_one() == "ok"
                assert session.connection().execute(sa.text("PRAGMA foreign_key_check")).all() == []

    def end(self) -> None:
        self._continue_all(float("inf"))
        if self.api.poll() is None:
            self.api.kill()
        self.api.wait()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def trainers_of(place: Workplace) -> list[int]:
    """The living processes of trainers that hold something of this data folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if TOKEN_VARIABLE in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                files = os.listdir(f"/proc/{process.pid}/fd")  # noqa: PTH208 - names are enough
                links = [os.readlink(f"/proc/{process.pid}/fd/{name}") for name in files]  # noqa: PTH115
                if any(link.startswith(str(place.settings.data_dir)) for link in links):
                    found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1520, help="of harm; jobs are submitted in the first 80 %%")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--cohort", type=int, default=len(SEEDS), help="most jobs that a trainer trains together")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(_env_file=None, data_dir=Path(folder))
        db = open_database(settings)
        migrate.upgrade(db)
        place = Workplace(db, settings)
        soak = Soak(place, workers=options.workers, seed=options.seed, cohort=options.cohort)
        try:
            soak.run(options.jobs, options.seconds)
            soak.judge()
        finally:
            soak.end()
            place.end()
            db.close()
        report = soak.report
        print(
            json.dumps(
                {
                    "jobs": dict(report.jobs),
                    "attempts": report.attempts,
                    "together": report.together,
                    "faults": dict(report.faults),
                    "seconds": round(report.seconds),
                    "orphans_swept": report.orphans_swept,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
