"""One attempt at a job, from the claim to the job's next status: it says what the trainer is to begin with, takes in
the trainer's messages, forwards cancel and pause requests, and has the trainer killed when it stalls or ignores a stop
request.

One thread advances it together with those at the other jobs of its trainer, and records what they have to record
(`attempts.py`). A lost lease or a failure of one has the trainer leave that job, and kills it only where it does not.
Knows no HTTP and no torch. A lost lease ends the attempt, and nothing more is written to the job.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from nanomoe.checkpoint import is_disk_full
from nanomoe.config import JobConfig
from nanomoe.lineage import ParentUnusable
from nanomoe.plan import OutOfMemory, Plan
from nanomoe.store.store import StoreError, StoreRefused, StoreUnavailable
from service.database.database import Database
from service.errors import DatabaseUnavailable, LeaseLost, StorageFull
from service.jobs.lease import Intents
from service.jobs.queue import Finish, Release
from service.jobs.recording import Report
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Job
from service.settings import Settings
from service.storage.opening import open_store
from worker.company import Member
from worker.held_lease import LeaseUncertain
from worker.memory import oom_kills
from worker.process import Ended
from worker.protocol import AboutJob, Done, Failure, Start, StopReason
from worker.recorder import Recorder
from worker.start import build_start
from worker.timing import Timing

log = structlog.get_logger(__name__)

EXTERNAL_FAILURES = (OSError, MemoryError, DatabaseUnavailable)
"""Exceptions in the supervisor whose cause is not the job: the data folder or the database is unreachable, or the
process has no file descriptor or memory left."""

STORE_FAILURES = ("storage_failed", StoreUnavailable.code, StoreRefused.code)
"""Codes of a trainer's failures whose cause is the store of files, and not the job."""

TERMINATION_SIGNALS = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
"""Signals that ask a process to end: from a system that shuts down, or from a person. No crash causes one of them."""

_PRECEDENCE = {None: 0, "drain": 1, "pause": 2, "cancel": 3}
"""Precedence of the reasons for a stop: a higher one replaces a lower one."""


class Attempt:
    """A claimed job that is trained by one trainer process, by itself or beside others."""

    def __init__(
        self,
        db: Database,
        member: Member,
        *,
        device: str,
        settings: Settings,
        timing: Timing,
        force_stop: threading.Event,
    ) -> None:
        """`member`: the job's share of a trainer. `force_stop`: the worker is to end at once."""
        self._db = db
        self.member = member
        self.lease = lease = member.lease
        self._claim = lease.claim
        self._job = lease.claim.job
        self._cohort_size = self._job.cohort_size or 1
        self._device = device
        self._settings = settings
        self._timing = timing
        self._force_stop = force_stop
        self._log = log.bind(job=self._job.id, fence=self._claim.fence, trainer=member.pid)

        self.has_begun = False
        """Whether there was something for the trainer to begin with."""
        self.is_abandoned = False
        """Whether nothing more of it is recorded but its end: it waits for the trainer to leave the job."""
        self._is_recorded = False
        """Whether the job's next status is."""
        self._done: Done | None = None
        """The trainer's final message about the job."""
        self._end: Finish | Release | None = None
        """How it ends, once that is decided."""
        self._stopping: StopReason | None = None
        """Why the trainer was asked to stop."""
        self._kill_at: float | None = None
        """Monotonic time at which the trainer is killed, if it was asked to stop."""
        self._lost = False
        """Whether the job belongs to another worker, or has ended."""
        self._disk_full = False
        self._crash: str | None = None
        """Why the attempt failed, where the trainer's exit status does not show it."""
        self._external_cause: str | None = None
        """Why the attempt failed, where the cause is not the job."""
        self._store_failed = False
        """Whether the cause was the store, which the supervisor itself could not read."""
        self._trainer_timed_out = False
        """Whether the trainer received no keep-alive for so long that it killed itself."""
        self._oom_kills = oom_kills()
        self._recorder = Recorder(lease.claim, open_store(settings))

    # -- The beginning, and messages -------------------------------------------------------------------------------

    def begin(self, meanwhile: Callable[[], None]) -> Start | None:
        """What the trainer is to begin with; None where it is to be given nothing of the job. `meanwhile` is called
        again and again while large files are verified."""
        self._log.info("attempt_started", attempt=self._job.attempt)

        def read() -> Start:
            start, self._recorder.snapshot_folder, warnings = build_start(
                self._db, self._job, device=self._device, settings=self._settings, meanwhile=self._unless(meanwhile)
            )
            for warning in warnings:
                self._recorder.handle(warning)
            return start

        start: Start | None = None
        with self._failures():
            start = self.lease.read(read)
        self.has_begun = start is not None
        return start

    def _unless(self, meanwhile: Callable[[], None]) -> Callable[[], None]:
        """`meanwhile`, until the job turns out to be lost."""

        def check() -> None:
            meanwhile()
            if self._lost:
                raise LeaseLost(f"job {self._job.id} was lost while it began")
            if self.lease.fenced.is_set():
                raise LeaseUncertain

        return check

    def handle(self, message: AboutJob) -> None:
        """Take in a message about the job."""
        if isinstance(message, Done):
            self._take_done(message)
        elif not self.is_abandoned:
            with self._failures():
                self._recorder.handle(message)

    def _take_done(self, done: Done) -> None:
        if not self.is_abandoned:
            self._done = done
        if self.member.is_alone:
            self._kill_within(self._timing.exit_grace)  # it has nothing more to do than to become idle
        else:
            self.member.leave()  # it goes on with other jobs, and writes nothing of this one any more

    def trainer_ended(self, ended: Ended) -> None:
        """Take note that the trainer has ended, or violated the protocol."""
        if not self.is_abandoned:
            self._crash = self._crash or ("the trainer violated the protocol" if ended.protocol_error else None)
            self._trainer_timed_out = ended.timed_out

    def trainer_is_idle(self) -> None:
        """Take note that the trainer says that nothing of its jobs is left."""
        if self._done is None and not self.is_abandoned:
            self._crash = self._crash or "the trainer did not report how its job ended"

    @property
    def is_done(self) -> bool:
        """Whether the trainer has said how the job ended."""
        return self._done is not None

    @property
    def lacked_store(self) -> bool:
        """Whether the job could not go on here because of the store of files."""
        failure = None if self._done is None else self._done.error
        return self._store_failed or (failure is not None and failure.code in STORE_FAILURES)

    # -- Due work --------------------------------------------------------------------------------------------------

    @property
    def due(self) -> float:
        """Monotonic time at which `run_due_work` has something to do."""
        stalled = self._stalled_at
        return stalled if self._kill_at is None else min(stalled, self._kill_at)

    def run_due_work(self) -> None:
        """Have a trainer killed that has stalled, or has not stopped."""
        now = time.monotonic()
        if now >= self._stalled_at:
            self._crash = f"stalled: no step in {now - self._recorder.last_progress:.0f} s"
            self._log.error("trainer_stalled", crash=self._crash)
            self.member.kill_as_crashed()
        if self._kill_at is not None and now >= self._kill_at:
            self._log.warning("trainer_killed", asked_to=self._stopping)
            self._kill_at = None
            self.member.kill()

    def drain(self) -> None:
        """Have the job stop with a snapshot, because the worker ends."""
        self._request_stop("drain")

    def handle_requests(self, found: Intents | None) -> None:
        """Forward what users have requested. `found`: None where the job is not this worker's any more."""
        if found is None:
            self.fail(LeaseLost(f"job {self._job.id} does not run under fence {self._claim.fence} any more"))
        elif found.cancel:
            self._request_stop("cancel")
        elif found.pause:
            self._request_stop("pause")

    def _request_stop(self, reason: StopReason) -> None:
        """Ask the trainer to stop at the next step boundary; after a grace period it is killed."""
        if self._force_stop.is_set():
            self._kill_within(0)
        if _PRECEDENCE[reason] > _PRECEDENCE[self._stopping] and not self.is_abandoned:
            self._log.info("trainer_asked_to_stop", reason=reason)
            self._stopping = reason
            self.member.stop(reason)
            self._kill_within(self._timing.cancel_grace if reason == "cancel" else self._timing.stop_grace)

    def _kill_within(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self._kill_at = at if self._kill_at is None else min(at, self._kill_at)

    @property
    def _stalled_at(self) -> float:
        """Monotonic time at which a trainer without progress counts as stalled."""
        if self._crash is not None or self.is_abandoned:
            return math.inf
        limit = max(self._timing.stall, self._timing.stall_steps * self._recorder.median_step_seconds)
        return self._recorder.last_progress + limit

    # -- What is to be recorded ------------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do: the job's next status is recorded, or not this worker's to record."""
        return self._is_recorded or (self._lost and not self.member.is_here)

    @property
    def _heartbeat_due(self) -> float:
        """Monotonic time of the next heartbeat; infinite where the job needs none any more."""
        is_needed = self.member.is_here and not self._lost and not self.lease.fenced.is_set()
        return self.lease.heartbeat_due if is_needed else math.inf

    def write_due(self, next_batch: float) -> float | None:
        """Monotonic time at which something of it should be recorded; None while there is nothing. `next_batch`: until
        when steps may wait."""
        if self.has_ended:
            return None
        if self._recorder.is_urgent or not self.member.is_here:
            return 0.0
        return min(self._heartbeat_due, next_batch) if self._recorder.has_steps else self._heartbeat_due

    def report(self, most_steps: int) -> Report | None:
        """What is to be recorded now: what waits, with at most so many steps, or a heartbeat when one is due; else
        None."""
        waiting = self._recorder.waiting(most_steps)
        if waiting is not None and self.lease.fenced.is_set():
            self.fail(LeaseUncertain())
            return None
        if waiting is None and time.monotonic() >= self._heartbeat_due:
            return Report(self._claim)
        return waiting

    @property
    def is_behind(self) -> bool:
        """After a write: whether it has left something that waited."""
        return self._recorder.is_urgent

    def recorded(self, began: float, outcome: Intents | Exception) -> None:
        """Take note that its report was recorded by a write that began then, or of the error."""
        with self._failures():
            if isinstance(outcome, Exception):
                raise outcome
            self.lease.renewed(began)
            self._recorder.recorded()
            if not self.is_abandoned:
                self.handle_requests(outcome)

    def fail(self, error: Exception) -> None:
        """End the attempt because of an error."""
        with self._failures():
            raise error

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What is raised within ends the attempt. The trainer must not outlive it, and the slot must go on."""
        try:
            yield
        except LeaseLost as error:
            self._log.warning("lease_lost", reason=str(error))
            self._lost = True
            self._abandon()
        except LeaseUncertain:
            self._log.warning("lease_uncertain")
            # The final message may have come, but not all before it is recorded.
            self._done = None
            self._abandon()
        except ParentUnusable as error:
            self._done = Done(outcome="failed", error=Failure(code=error.code, message=str(error)))
            self._abandon()
        except Exception as error:
            self._disk_full = isinstance(error, StorageFull) or is_disk_full(error)
            self._store_failed = isinstance(error, StoreError)
            reason = error.summary if isinstance(error, StoreError) else f"the supervisor failed: {error!r}"
            if isinstance(error, EXTERNAL_FAILURES):
                self._external_cause = reason
            else:
                self._crash = reason
            self._log.exception("attempt_failed")
            self._abandon()

    def _abandon(self) -> None:
        """Have the trainer leave the job, whose messages nobody wants any more."""
        self._recorder.forget()
        if not self.is_abandoned and self.has_begun:
            self.member.stop("cancel")
            self._kill_within(self._timing.cancel_grace)
        self.is_abandoned = True

    # -- The end ---------------------------------------------------------------------------------------------------

    @property
    def end(self) -> Finish | Release | None:
        """How it ends, once nothing of the job is left in the trainer and nothing waits to be recorded before."""
        if self.has_ended or self.member.is_here or self._recorder.is_urgent or self._recorder.has_steps:
            return None
        if self._end is None:
            self._end = self._transition()
        return self._end

    def ended(self, outcome: Job | Exception) -> None:
        """Take note that its end was recorded, or of the error."""
        self._is_recorded = True
        if isinstance(outcome, LeaseLost):
            self._log.warning("lease_lost", reason=str(outcome))
        elif isinstance(outcome, Exception):
            self._log.error("end_not_recorded", exc_info=outcome)
        else:
            if outcome.status in TERMINAL:
                self._recorder.drop_snapshot()
            self._log.info(
                "attempt_ended", status=outcome.status, status_reason=outcome.status_reason, error=outcome.error
            )

    def _transition(self) -> Finish | Release:
        """What leads to the job's next status. No process of it is left."""
        claim = self._claim
        match self._done:
            case None if self.lease.is_uncertain:
                return Release(claim)
            case Done(outcome="succeeded"):
                recorder = self._recorder
                return Finish(claim, "succeeded", reason=recorder.stopped_early_reason, progress=recorder.progress)
            case Done(outcome="failed", error=Failure(code="disk_full", message=message)):
                return Release(claim, pause_reason=message)
            case Done(outcome="failed", error=Failure(code=code, message=message)) if code in STORE_FAILURES:
                return self._transition_external(message)
            case Done(outcome="failed", error=Failure(code=OutOfMemory.code)) if self._cohort_size > 1:
                return self._transition_to_narrower()
            case Done(outcome="failed", error=error):
                assert error is not None, "a failure has an error"
                return Finish(claim, "failed", error=error.model_dump())
            case Done(outcome="stopped"):
                return Release(claim)
        if self._disk_full:
            return Release(claim, pause_reason="the disk is full")
        if self._crash is None and self._stopping is not None:
            return Release(claim)  # it was killed because it did not stop in time
        if self._crash is None and self.member.was_interrupted:
            return Release(claim)  # it was killed because of another job
        if self._external_cause is not None:
            return self._transition_external(self._external_cause)
        if self._crash is not None:
            return self._transition_crashed(self._crash)
        exit_status = self.member.exit_status
        if -exit_status in TERMINATION_SIGNALS:
            return self._transition_external(_describe(exit_status))
        if exit_status == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return self._transition_to_narrower() if self._cohort_size > 1 else self._transition_out_of_memory()
        if exit_status == -signal.SIGKILL and self._trainer_timed_out:
            return self._transition_external(
                "the trainer received no keep-alive from its worker for too long and killed itself"
            )
        return self._transition_crashed(_describe(exit_status))

    def _transition_crashed(self, crash: str) -> Release:
        self._log.error("trainer_crashed", crash=crash)
        return Release(self._claim, crash=crash)

    def _transition_external(self, reason: str) -> Release:
        """The cause is not the job: it is tried again, and no crash is counted."""
        self._log.error("attempt_ended_by_external_cause", reason=reason)
        return Release(self._claim, external_cause=reason)

    def _transition_to_narrower(self) -> Release:
        """Memory ran out for jobs that are trained together: fewer of them are, before any micro-batch is halved."""
        half = self._cohort_size // 2
        self._log.warning("cohort_out_of_memory", size=self._cohort_size, most=half)
        reason = f"memory ran out for {self._cohort_size} jobs at once, goes on " + (
            f"among at most {half}" if half > 1 else "alone"
        )
        return Release(self._claim, cohort_most=half, interrupted=reason)

    def _transition_out_of_memory(self) -> Finish | Release:
        """The kernel's out-of-memory kill is handled as torch's own out-of-memory error: the micro-batch is halved
        where that is possible."""
        claim, prepared = self._claim, self._recorder.prepared
        config = JobConfig.model_validate(self._job.config)
        try:
            if prepared is None:
                raise OutOfMemory("not even the model and its text fit")
            plan = Plan.of(config, prepared.n_tokens)
            size = min(self._recorder.micro_batch, plan.n_windows)
            half = plan.halved(size, config)
        except OutOfMemory as refusal:
            figures = f"batch_size {config.batch_size}, block_size {config.block_size}, n_params {self._job.n_params}"
            message = f"the system killed the trainer because memory ran out: {refusal} ({figures})"
            return Finish(claim, "failed", error={"code": refusal.code, "message": message})
        step = self._recorder.progress["step"]
        self._log.warning("trainer_out_of_memory", step=step, micro_batch=size)
        halved = (
            f"after step {step}, with micro-batches of {size} windows, the system killed the trainer because memory "
            f"ran out; from now on they have {half}: a step trains on the same windows in more parts"
        )
        return Release(
            claim,
            micro_batch=half,
            interrupted=f"memory ran out, goes on with micro-batches of {half} windows",
            warnings=[
                {"code": "micro_batch_halved", "message": halved},
                {"code": "resume_not_exact", "message": "sums over smaller micro-batches are rounded otherwise"},
            ],
        )


def _describe(exit_status: int) -> str:
    if exit_status < 0:
        return f"the trainer was killed by {signal.Signals(-exit_status).name}"
    return f"the trainer ended with status {exit_status} before it was done"
