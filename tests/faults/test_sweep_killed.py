"""A sweep whose trainers and supervisors are killed: every job ends once, with the bytes of an undisturbed one.

`python -m tests.faults.killed_sweeps --kills 50` kills more often those whose jobs are trained together.
"""

import random
import signal
from dataclasses import replace
from functools import partial

import psutil

from nanomoe.config import JobConfig
from service.jobs import reads, sweeps
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.numbered_events import EventFilter, EventReader
from service.jobs.statuses import TERMINAL
from service.jobs.submit import submit_sweep
from tests.databases import ONLY_POSTGRESQL
from tests.faults import killed_sweeps
from tests.faults.killed_sweeps import KilledSweeps
from tests.faults.undisturbed import DENSE, TEXT, assert_undisturbed, hooked, train_undisturbed
from tests.worker.workplace import SHORT_LEASE, Workplace, trainers_of

GRID = killed_sweeps.GRID[:2] + killed_sweeps.GRID[-2:]
FAULTS = ("trainer", "trainer", "supervisor", "trainer", "trainer", "supervisor")
TIMING = replace(SHORT_LEASE, lease=3.0)


@ONLY_POSTGRESQL  # where several transactions are under way when a process dies; the soak kills on SQLite
def test_jobs_that_are_trained_together_end_once_with_their_own_bytes_whatever_is_killed(place: Workplace) -> None:
    killed = KilledSweeps(place, seed=20261129)
    report = killed.run(4)
    assert sum(report.kills.values()) == 4
    assert report.kills["worker in company"] >= 2
    assert report.kills["trainer in company"] >= 1


@ONLY_POSTGRESQL
def test_every_job_of_a_sweep_whose_processes_are_killed_ends_once_with_its_own_bytes(place: Workplace) -> None:
    jobs = [NewJob(text=TEXT, config=JobConfig(**config).model_dump(mode="json")) for config in GRID]
    sweep, _ = submit_sweep(place.db, NewSweep(jobs=jobs, config=DENSE, parameters=[]))

    def progress() -> int:
        return sweeps.get_sweep(place.db, sweep.id)[2].step

    def start() -> psutil.Process:
        worker = place.start_worker(program=hooked({}), slots=2, timing=TIMING, max_crashes=100, snapshot_seconds=0.05)
        return psutil.Process(worker.pid)

    n_steps = len(GRID) * len(train_undisturbed(JobConfig(**GRID[0])).steps)
    chance = random.Random(20261129)  # noqa: S311 - the points are the same every time
    points = sorted(chance.sample(range(1, n_steps * 4 // 5), len(FAULTS)))
    worker = start()
    for point, fault in zip(points, FAULTS, strict=True):
        place.wait_until(lambda point=point: progress() >= point)  # type: ignore[misc]
        if fault == "supervisor":
            worker.send_signal(signal.SIGKILL)
            worker = start()
        else:
            trainers = place.wait_until(partial(trainers_of, worker.pid))
            chance.choice(trainers).send_signal(signal.SIGKILL)
    place.wait_until(lambda: sweeps.has_ended(place.db, sweep.id))

    _, counts, found = sweeps.get_sweep(place.db, sweep.id)
    assert {status: n for status, n in counts.items() if n} == {"succeeded": len(GRID)}
    rows = [reads.get_job(place.db, job_id) for job_id in found.job_ids]
    assert sum(row.attempt for row in rows) > len(GRID), "nothing was killed"
    for row, config in zip(rows, GRID, strict=True):
        assert [status for status in place.statuses(row) if status in TERMINAL] == ["succeeded"]
        assert_undisturbed(place, row, train_undisturbed(JobConfig(**config)))
    told, _ = EventReader(place.db, EventFilter(sweep_id=sweep.id), 0).read()
    for row in rows:
        of_job = [event.data["status"] for event in told if event.job_id == row.id and event.kind == "status"]
        assert of_job == place.statuses(row)
