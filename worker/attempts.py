"""The thread of a slot while its trainer has jobs: it takes the trainer's messages, advances the attempt at each job,
and writes what all of them have to record, in one transaction.

A single job's steps are written twice a second, and all else at once. What several jobs have to record waits up to half
a second for what the others have, so that their number does not count: neither for the database nor for this process.
A database that is out of reach stops nothing here; what waits is written once it is back, or its lease has passed.
"""

import threading
import time
from collections.abc import Iterable, Sequence

import structlog

from service.database.database import Database
from service.errors import DatabaseUnavailable, LeaseLost, StorageFull
from service.jobs.lease import find_requests
from service.jobs.queue import Finish, Release
from service.jobs.tables import Job
from worker.attempt import Attempt
from worker.company import Company
from worker.process import Ended, Received, WakeUp
from worker.protocol import Idle, Ready
from worker.shared_writes import SharedWrites
from worker.timing import Timing

log = structlog.get_logger(__name__)

_MOST_MESSAGES = 1000
"""Messages that are taken one after another before anything else is looked at."""

_MOST_STEPS = 10_000
"""Steps that go in one transaction: it renews the leases of all jobs, and must not take as long as they last, however
far the database is behind. A step takes PostgreSQL about 0.1 ms on a busy machine (measured)."""


class Attempts:
    """The attempts at the jobs that one trainer is given together."""

    def __init__(
        self,
        db: Database,
        writes: SharedWrites,
        company: Company,
        attempts: Sequence[Attempt],
        *,
        timing: Timing,
        draining: threading.Event,
        force_stop: threading.Event,
    ) -> None:
        """`attempts`: one for each member of the company. `draining`: the worker is to end once its jobs have
        snapshots; `force_stop`: at once."""
        self._db = db
        self._writes = writes
        self._company = company
        self._attempts = list(attempts)
        self._by_assignment = {attempt.member.assignment: attempt for attempt in attempts}
        self._timing = timing
        self._draining = draining
        self._force_stop = force_stop
        self._is_over = False
        """Whether the trainer is idle or has ended, or was never given a job."""
        self._last_write = 0.0
        """Monotonic time at which the last write ended: from its end on, so that a slow disk leaves others their turn
        at the database."""
        self._is_behind = False
        """Whether the last transaction has left anything that waited before it."""
        self._retry_at = 0.0
        """Monotonic time before which nothing is written, after the database was out of reach."""
        self._poll_due: float | None = 0.0
        """Monotonic time at which cancel and pause requests are read next; None while nothing has changed."""
        self._last_poll = 0.0
        self._bug: Exception | None = None

    def run(self) -> None:
        """Until nothing of the jobs is left and the next status of each is recorded. Raises what recording one has
        raised, unless that is an error of the database."""
        self._begin()
        while not self._is_over and not all(attempt.is_abandoned for attempt in self._here()):
            self._take_messages()
            self._run_due_work()
        while not self._company.end(self._timing.heartbeat):
            self._write()  # heartbeats keep the jobs this worker's
        self._write()
        while not all(attempt.has_ended for attempt in self._attempts) and not self._force_stop.is_set():
            if not self._is_behind:
                self._force_stop.wait(self._timing.retry)
            self._write()
        if self._bug is not None:
            raise self._bug

    def _here(self) -> list[Attempt]:
        """The attempts whose jobs the trainer may still have."""
        return [attempt for attempt in self._attempts if attempt.member.is_here]

    def _begin(self) -> None:
        starts = [start for attempt in self._attempts if (start := attempt.begin(self._write_heartbeats)) is not None]
        self._is_over = not starts
        if starts:
            try:
                self._company.begin(starts)
            except Exception as error:
                self._fail(error)
            for attempt in self._attempts:
                if not attempt.has_begun:
                    attempt.member.leave()

    def _fail(self, error: Exception) -> None:
        """End all attempts because of an error that they have in common."""
        for attempt in self._here():
            attempt.fail(error)

    # -- Messages --------------------------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        """Wait for a message until work is due, and take all that have come."""
        trainer = self._company.trainer
        message = trainer.next_message(max(0.0, self._due() - time.monotonic()))
        for _ in range(_MOST_MESSAGES):
            match message:
                case None:
                    return
                case WakeUp():
                    self._poll_due = self._poll_due or max(time.monotonic(), self._last_poll + self._timing.poll)
                case Received(message=Idle()):
                    self._handle_idle()
                case Received(message=about_job, assignment=assignment) if assignment is not None:
                    assert not isinstance(about_job, Ready | Idle), "they are about no job"
                    self._by_assignment[assignment].handle(about_job)
                case Ended():
                    for attempt in self._here():
                        attempt.trainer_ended(message)
                    self._is_over = True
                case _:
                    pass
            message = None if self._is_over else trainer.next_message()

    def _handle_idle(self) -> None:
        here = self._here()
        for attempt in here:
            attempt.trainer_is_idle()
        if all(attempt.is_done for attempt in here):
            self._company.idle()
        self._is_over = True

    # -- Due work --------------------------------------------------------------------------------------------------

    def _due(self) -> float:
        """Monotonic time at which there is work to do though no message comes."""
        due = [attempt.due for attempt in self._here()]
        due += [at for at in (self._poll_due, self._write_due()) if at is not None]
        return min(due)

    def _write_due(self) -> float | None:
        """Monotonic time of the next write; None while nothing waits to be written."""
        due = [at for attempt in self._attempts if (at := attempt.write_due(self._next_batch)) is not None]
        if not due:
            return None
        waits_for_others = len(self._company.members_here) > 1 and not self._is_behind
        return max(min(due), self._retry_at, self._next_batch if waits_for_others else 0.0)

    @property
    def _next_batch(self) -> float:
        """Monotonic time until which what is not urgent waits. The same for all slots of this machine, so that what
        they write goes together (`shared_writes.py`)."""
        return (self._last_write // self._timing.record + 1) * self._timing.record

    def _run_due_work(self) -> None:
        now = time.monotonic()
        write_due = self._write_due()
        if write_due is not None and now >= write_due:
            self._write()
        if self._poll_due is not None and now >= self._poll_due:
            self._poll()
        for attempt in self._here():
            attempt.run_due_work()

    def _poll(self) -> None:
        """Read the requests about all of the jobs: the next write, which returns them too, may be seconds away."""
        self._poll_due, self._last_poll = None, time.monotonic()
        here = self._here()
        if self._draining.is_set():
            for attempt in here:
                attempt.drain()
        claims = {attempt.lease.claim.key: attempt for attempt in here}
        try:
            found = find_requests(self._db, list(claims))
        except DatabaseUnavailable:
            return  # the next heartbeat logs it, and retries
        except Exception as error:
            self._fail(error)
            return
        for key, attempt in claims.items():
            attempt.handle_requests(found.get(key))

    # -- Writes ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Record all that waits, and the ends of the attempts that have one. What cannot be recorded yet waits on."""
        self._record(self._attempts)
        ends = {attempt: end for attempt in self._attempts if (end := attempt.end) is not None}
        finishes = {attempt: end for attempt, end in ends.items() if isinstance(end, Finish)}
        releases = {attempt: end for attempt, end in ends.items() if isinstance(end, Release)}
        if finishes:
            self._end(finishes, self._writes.finish.all(list(finishes.values())))
        if releases:
            self._end(releases, self._writes.release.all(list(releases.values())))

    def _write_heartbeats(self) -> None:
        """While the attempts begin: keep the jobs this worker's."""
        now = time.monotonic()
        if now >= self._retry_at:
            self._record([attempt for attempt in self._attempts if now >= attempt.lease.heartbeat_due])

    def _record(self, attempts: Sequence[Attempt]) -> None:
        most = max(1, _MOST_STEPS // len(self._attempts))
        waiting = [(attempt, report) for attempt in attempts if (report := attempt.report(most)) is not None]
        if not waiting:
            return
        began = time.monotonic()
        outcomes = self._writes.report.all([report for _, report in waiting])
        self._last_write, self._is_behind = time.monotonic(), False
        for (attempt, _), outcome in zip(waiting, outcomes, strict=True):
            if isinstance(outcome, DatabaseUnavailable):
                self._retry_at = self._last_write + self._timing.retry
                log.warning("database_out_of_reach", job=attempt.lease.claim.job_id, error=str(outcome))
            else:
                attempt.recorded(began, outcome)
                self._is_behind |= attempt.is_behind

    def _end(self, attempts: Iterable[Attempt], outcomes: Sequence[Job | Exception]) -> None:
        for attempt, outcome in zip(attempts, outcomes, strict=True):
            match outcome:
                case Job() | LeaseLost():
                    attempt.ended(outcome)
                case DatabaseUnavailable() | StorageFull():
                    self._retry_at = time.monotonic() + self._timing.retry
                    log.warning("database_out_of_reach", job=attempt.lease.claim.job_id, error=str(outcome))
                case _:
                    self._bug = outcome
                    attempt.ended(outcome)
