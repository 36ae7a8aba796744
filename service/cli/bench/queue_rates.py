"""How many jobs a second the queue takes, hands out and ends, with several processes at it, as workers and clients are.

Nothing is trained: what is measured is the database and this program's way of using it.
"""

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nanomoe.config import JobConfig
from service.cli.bench.fill import fill
from service.database.database import Database
from service.database.opening import open_database
from service.jobs import queue
from service.jobs.claim_order import jobs
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.queue import Finish
from service.jobs.submit import submit_job, submit_sweep
from service.jobs.workers import WorkerIdentity, worker_started
from service.settings import Settings

WAITING = 50_000
"""Jobs in the line when a measurement begins."""

IN_A_SWEEP = 100
"""Jobs that are submitted at once."""

PACE = 500
"""Jobs a second, of all processes together, at which claims are timed once more. With processes that never pause, the
time of a claim is mostly the time that it waits for the processor."""

_LEASE_SECONDS = 3600.0


@dataclass(frozen=True)
class QueueRate:
    """How fast one kind of transaction is, by all processes together."""

    what: str
    at_once: int
    """Jobs of a transaction."""

    n_jobs: int
    jobs_per_sec: float
    cpu_seconds_per_job: float
    """Processor time of the measuring processes, the database's server aside: what a busy machine changes least."""

    p50_seconds: float
    """Median time of a transaction; of claim-and-finish, of its claim."""

    p99_seconds: float


@dataclass(frozen=True)
class QueueRates:
    """All rates of one database."""

    database: str
    n_connections: int
    n_rows: int
    """Ended jobs in the table beforehand."""

    held_open: bool
    """Whether another transaction stood open meanwhile, so that no dead row could be removed."""

    rates: list[QueueRate]


def measure(
    settings: Settings,
    db: Database,
    *,
    n_connections: int,
    at_once: Sequence[int],
    seconds: float,
    n_rows: int,
    held_open: bool,
) -> QueueRates:
    """Measure each kind of transaction for `seconds`, with each number of jobs `at_once`."""
    rates = []
    submit_job(db, NewJob(text="Era uma vez", config=JobConfig().model_dump(mode="json")))
    fill(db, n_rows, status="succeeded", finished_at=db.now)
    with _processes(settings, n_connections) as run:
        fill(db, WAITING)
        _analyze(db)
        with _held_open(db, wanted=held_open):
            rates.append(_rate("submit, in sweeps", IN_A_SWEEP, run(_submit, IN_A_SWEEP, seconds)))
            for size in at_once:
                rates.append(_rate("claim", size, run(_claim, size, seconds)))
                rates.append(_rate("finish", size, run(_finish, size, 2 * seconds)))
                rates.append(_rate("claim and finish", size, run(_claim_and_finish, size, seconds)))
                rates.append(_rate(f"the same, {PACE}/s wanted", size, run(_claim_and_finish_paced, size, seconds)))
    return QueueRates(db.engine.dialect.name, n_connections, n_rows, held_open, rates)


Timed = tuple[int, list[float], float, float]
"""The number of jobs, the seconds of each transaction, the seconds from the first to the last, and those in which the
processor was used."""

_db: Database
_worker: WorkerIdentity
_barrier: Any
_n_processes: int
_claimed: list[Any]


@contextmanager
def _processes(settings: Settings, n: int) -> Iterator[Callable[[Callable[[int, float], Timed], int, float], Any]]:
    """A function that runs another in each of `n` processes at once, each with a connection of its own."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(n)
    with ProcessPoolExecutor(n, context, _start, (settings, barrier, n)) as pool:

        def run(work: Callable[[int, float], Timed], size: int, seconds: float) -> list[Timed]:
            return [done.result() for done in [pool.submit(work, size, seconds) for _ in range(n)]]

        yield run


def _start(settings: Settings, barrier: Any, n_processes: int) -> None:
    global _db, _worker, _barrier, _n_processes, _claimed
    _db, _worker, _claimed = open_database(settings), WorkerIdentity(name="bench"), []
    _barrier, _n_processes = barrier, n_processes
    worker_started(_db, _worker)


def _submit(size: int, seconds: float) -> Timed:
    config = JobConfig().model_dump(mode="json")
    members = [NewJob(text="Era uma vez", config=config, n_tokens=3, total_steps=500) for _ in range(size)]
    new = NewSweep(jobs=members, config={}, parameters=[])

    def submit() -> int:
        submit_sweep(_db, new)
        return size

    return _timed(seconds, submit)


def _claim(size: int, seconds: float) -> Timed:
    def claim() -> int:
        found = queue.claim_jobs(_db, _worker, _LEASE_SECONDS, size, look_first=False)
        _claimed.extend(found)
        return len(found)

    return _timed(seconds, claim)


def _finish(size: int, seconds: float) -> Timed:
    def finish() -> int:
        ends, _claimed[:] = _claimed[:size], _claimed[size:]
        return len(queue.finish_jobs(_db, [Finish(one, "succeeded") for one in ends])) if ends else 0

    return _timed(seconds, finish)


def _claim_and_finish(size: int, seconds: float) -> Timed:
    """Only the claims are timed: the two together are what the rate counts."""
    return _claims_and_finishes(size, seconds, every=0)


def _claim_and_finish_paced(size: int, seconds: float) -> Timed:
    """The same, begun at even times, which differ from one process to the next: `PACE` jobs a second, as far as the
    machine can."""
    return _claims_and_finishes(size, seconds, every=size * _n_processes / PACE)


def _claims_and_finishes(size: int, seconds: float, *, every: float) -> Timed:
    taken: list[float] = []
    due: float | None = None

    def both() -> int:
        nonlocal due
        now = time.perf_counter()
        if due is None:  # processes that were started one after the other have numbers one after the other
            due = now - os.getpid() % _n_processes / _n_processes * every
        due = max(due, now - every) + every
        time.sleep(max(0.0, due - time.perf_counter()))
        began = time.perf_counter()
        found = queue.claim_jobs(_db, _worker, _LEASE_SECONDS, size, look_first=False)
        taken.append(time.perf_counter() - began)
        return len(queue.finish_jobs(_db, [Finish(one, "succeeded") for one in found])) if found else 0

    n, _, wall, cpu = _timed(seconds, both)
    return n, taken, wall, cpu


def _timed(seconds: float, do: Callable[[], int]) -> Timed:
    """Repeat `do`, which returns its number of jobs, for `seconds` or until there are none left."""
    _barrier.wait()
    n, taken, began, cpu = 0, [], time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        before = time.perf_counter()
        done = do()
        if not done:
            break
        n += done
        taken.append(time.perf_counter() - before)
    return n, taken, time.perf_counter() - began, time.process_time() - cpu


def _rate(what: str, at_once: int, done: Sequence[Timed]) -> QueueRate:
    taken = sorted(seconds for _, some, _, _ in done for seconds in some)
    n_jobs = sum(n for n, *_ in done)
    wall = max(wall for _, _, wall, _ in done)
    cpu = sum(cpu for *_, cpu in done)
    p50 = statistics.median(taken) if taken else math.nan
    p99 = taken[math.ceil(0.99 * len(taken)) - 1] if taken else math.nan
    return QueueRate(what, at_once, n_jobs, n_jobs / wall, cpu / max(n_jobs, 1), p50, p99)


def _analyze(db: Database) -> None:
    """Tell the planner how large the tables are, as PostgreSQL's own maintenance does a minute later."""
    if not db.is_sqlite:
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("SET statement_timeout = 0"))
            connection.execute(sa.text("VACUUM ANALYZE jobs"))


@contextmanager
def _held_open(db: Database, *, wanted: bool) -> Iterator[None]:
    """A transaction that has read the jobs and does not end."""
    if not wanted:
        yield
        return
    with db.read() as session:
        if not db.is_sqlite:
            session.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        session.execute(sa.select(jobs.c.id).limit(1))
        yield
