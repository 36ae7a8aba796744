"""What the slots of a worker write at the same time, in one transaction: claims, reports, ends of attempts.

A slot writes at once what all of its jobs have to write. While one slot's write is on its way, others wait for their
turn; the first of them then takes along all that wait. Nobody waits when nobody else writes, and the slower the
database is, the more go together.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from service.database.database import Database
from service.errors import DatabaseUnavailable, LeaseLost, SchemaMismatch, StorageFull, TransactionBlocked
from service.jobs import queue, recording
from service.jobs.lease import Claim, Intents
from service.jobs.queue import Finish, Release
from service.jobs.recording import Report
from service.jobs.tables import Job
from service.jobs.workers import WorkerIdentity, worker_measured

Request = TypeVar("Request")
Outcome = TypeVar("Outcome")

_OF_ALL = (DatabaseUnavailable, StorageFull, SchemaMismatch)
"""Errors of the database, which every write of a batch has in common, unless it is a TransactionBlocked."""


@dataclass(eq=False)
class _Call(Generic[Request, Outcome]):
    request: Request
    outcome: Outcome | Exception | None = None
    turn_is_over: bool = False
    goes_alone: bool = False
    """Whether it failed together with others, one of which may be the cause."""


class Together(Generic[Request, Outcome]):
    """Requests of several threads, those that come meanwhile done as one. Thread-safe."""

    def __init__(self, do: Callable[[Sequence[Request]], Sequence[Outcome | LeaseLost]]) -> None:
        """`do` returns an outcome for each request; a LeaseLost is that request's alone."""
        self._do = do
        self._turn = threading.Lock()
        self._waiting: list[_Call[Request, Outcome]] = []
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Outcome:
        """The outcome of one request. Raises LeaseLost, and what `do` raises."""
        (outcome,) = self.all([request])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def all(self, requests: Sequence[Request]) -> list[Outcome | Exception]:
        """The outcome of each of a slot's requests, or the error that it would raise."""
        calls = [_Call[Request, Outcome](request) for request in requests]
        with self._lock:
            self._waiting += calls
        with self._turn:
            if not all(call.turn_is_over for call in calls):
                self._run_waiting(calls)
        # Beside each other and those of other slots: one that waits for a lock holds up nobody else's turn.
        if alone := [call for call in calls if call.goes_alone]:
            if len(alone) == 1:
                self._run(alone)
            else:
                with ThreadPoolExecutor(len(alone)) as pool:
                    for ran in [pool.submit(self._run, [call]) for call in alone]:
                        ran.result()
        return [cast("Outcome | Exception", call.outcome) for call in calls]

    def _run_waiting(self, own: Sequence[_Call[Request, Outcome]]) -> None:
        with self._lock:
            batch = list(self._waiting)
        try:
            self._run(batch)
        finally:
            # Should this thread die of it, the others have their turn still to come: none is lost.
            with self._lock:
                self._waiting = [call for call in self._waiting if call not in own and not call.turn_is_over]

    def _run(self, batch: Sequence[_Call[Request, Outcome]]) -> None:
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = self._do([call.request for call in batch])
        except Exception as error:
            is_of_all = isinstance(error, _OF_ALL) and not isinstance(error, TransactionBlocked)
            if len(batch) > 1 and not is_of_all:
                # One of them cannot be written, or its row is locked: the others must not fail with it.
                for call in batch:
                    call.goes_alone = call.turn_is_over = True
                return
            outcomes = [error] * len(batch)
        for call, outcome in zip(batch, outcomes, strict=True):
            call.outcome, call.turn_is_over = outcome, True


class SharedWrites:
    """The writes of one worker that several of its slots may make at once."""

    def __init__(self, db: Database, worker: WorkerIdentity) -> None:
        self._db = db
        self._worker = worker
        self._claims = Together[int, Sequence[Claim]](self._claim_for)
        self._jobs_wait = False
        """Whether the last claim found jobs for as many slots as it asked for."""
        self.report = Together[Report, Intents](lambda reports: recording.record_reports(db, reports))
        """Renew a job's lease, and record what there is of it. One transaction at a time, whatever it is about: the
        threads of one process would starve each other at SQLite's lock."""

        self.finish = Together[Finish, Job](lambda finishes: queue.finish_jobs(db, finishes))
        """End an attempt that ran to its end."""

        self.release = Together[Release, Job](lambda releases: queue.release_jobs(db, releases))
        """End an attempt that did not."""

    def measured(self, device: str, cohort: int) -> None:
        """Record how many jobs of one shape are trained together on a device. Raises as `worker_measured`."""
        worker_measured(self._db, self._worker.id, device, cohort)

    def claim(self, width: int = 1) -> Sequence[Claim]:
        """The next job in line for one slot, or the next cohort of at most `width`; nothing where no job waits."""
        return self._claims(width)

    def _claim_for(self, widths: Sequence[int]) -> list[Sequence[Claim] | LeaseLost]:
        found: dict[int, list[Sequence[Claim]]] = {}
        for width in set(widths):  # those of all slots, unless their devices differ
            n = widths.count(width)
            found[width] = queue.claim_cohorts(
                self._db, self._worker, self._worker.lease_seconds, n, width, look_first=not self._jobs_wait
            )
            self._jobs_wait = len(found[width]) == n
        return [found[width].pop(0) if found[width] else () for width in widths]
