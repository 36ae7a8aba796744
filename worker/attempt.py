"""One attempt at a job, from the claim to the job's next status: it starts the trainer, records the trainer's messages,
forwards cancel and pause requests, and kills the trainer when it stalls, ignores a stop request or the lease is lost.

Knows no HTTP and no torch. A lost lease ends the attempt at once, and nothing more is written to the job.
"""

import signal
import threading
import time
from collections.abc import Callable

import structlog

from nanomoe.checkpoint import is_disk_full
from nanomoe.config import JobConfig
from nanomoe.lineage import ParentUnusable
from nanomoe.plan import OutOfMemory, Plan
from service.database.database import Database
from service.errors import DatabaseUnavailable, LeaseLost, StorageFull
from service.jobs import queue, reads, recording
from service.jobs.lease import Intents
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Job
from service.settings import Settings
from worker.held_lease import Lease, LeaseUncertain
from worker.lock import SlotLock
from worker.memory import oom_kills
from worker.process import Ended, TrainerProcess, WakeUp
from worker.protocol import Done, Failure, FromTrainer, Idle, Ready, Stop, StopReason
from worker.recorder import Recorder
from worker.start import build_start
from worker.timing import Timing

log = structlog.get_logger(__name__)

EXTERNAL_FAILURES = (OSError, MemoryError, DatabaseUnavailable)
"""Exceptions in the supervisor whose cause is not the job: the data folder or the database is unreachable, or the
process has no file descriptor or memory left."""

TERMINATION_SIGNALS = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
"""Signals that ask a process to end: from a system that shuts down, or from a person. No crash causes one of them."""

_PRECEDENCE = {None: 0, "drain": 1, "pause": 2, "cancel": 3}
"""Precedence of the reasons for a stop: a higher one replaces a lower one."""


class Attempt:
    """A claimed job that is trained by one trainer process."""

    def __init__(
        self,
        db: Database,
        lease: Lease,
        trainer: TrainerProcess,
        lock: SlotLock,
        *,
        device: str,
        settings: Settings,
        timing: Timing,
        draining: threading.Event,
        force_stop: threading.Event,
    ) -> None:
        """`lock`: the slot's, taken for this job. `draining`: the worker is to end once its jobs have snapshots;
        `force_stop`: at once."""
        self._db = db
        self._lease = lease
        self._claim = lease.claim
        self._job = lease.claim.job
        self._trainer = trainer
        self._lock = lock
        self._device = device
        self._settings = settings
        self._timing = timing
        self._draining = draining
        self._force_stop = force_stop
        self._log = log.bind(job=self._job.id, fence=self._claim.fence, trainer=trainer.pid)

        self._done: Done | None = None
        """The trainer's final message about the job."""
        self.trainer_is_idle = False
        """Whether the trainer has outlived its job, with nothing of it left: it can be given the next one."""
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
        self._trainer_timed_out = False
        """Whether the trainer received no keep-alive for so long that it killed itself."""
        self._oom_kills = oom_kills()

        self._poll_due: float | None = 0.0
        """Monotonic time at which cancel and pause requests are read next; None while nothing has changed."""
        self._last_poll = 0.0
        self._recorder = Recorder(db, lease, settings.data_dir, timing, self._apply)

    def run(self) -> None:
        """Run the attempt until no process of it is left, then record the job's next status."""
        try:
            self._start()
            self._follow()
        except LeaseLost as error:
            self._log.warning("lease_lost", reason=str(error))
            self._lost, self.trainer_is_idle = True, False
        except LeaseUncertain:
            self._log.warning("lease_uncertain")
            # The final message may have come, but not all before it is recorded.
            self._done, self.trainer_is_idle = None, False
        except ParentUnusable as error:
            self._done = Done(outcome="failed", error=Failure(code=error.code, message=str(error)))
            self.trainer_is_idle = True  # it was given nothing
        except Exception as error:
            self.trainer_is_idle = False
            # Whatever it is, the trainer must not outlive the attempt, and the slot must go on with the next job.
            self._disk_full = isinstance(error, StorageFull) or is_disk_full(error)
            reason = f"the supervisor failed: {error!r}"
            if isinstance(error, EXTERNAL_FAILURES):
                self._external_cause = reason
            else:
                self._crash = reason
            self._log.exception("attempt_failed")
        self._end_processes_left()
        if not self._lost:
            self._settle()

    # -- Messages -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._log.info("attempt_started", attempt=self._job.attempt)
        start, snapshot_folder, warnings = self._lease.read(
            lambda: build_start(
                self._db, self._job, device=self._device, settings=self._settings, meanwhile=self._heartbeat_when_due
            )
        )
        self._recorder.snapshot_folder = snapshot_folder
        self._trainer.start(start, self._lock)
        for warning in warnings:
            self._recorder.handle(warning)

    def _follow(self) -> None:
        """Handle the trainer's messages and run due work until the trainer is idle or has ended."""
        while True:
            match message := self._next_message():
                case Ended(protocol_error=protocol_error, timed_out=timed_out):
                    self._crash = self._crash or ("the trainer violated the protocol" if protocol_error else None)
                    self._trainer_timed_out = timed_out
                    break
                case None | Ready():
                    pass
                case WakeUp():
                    self._poll_due = self._poll_due or max(time.monotonic(), self._last_poll + self._timing.poll)
                case Done():
                    self._done = message
                    self._kill_within(self._timing.exit_grace)
                case Idle():
                    if self._done is None:
                        self._crash = self._crash or "the trainer did not report how its job ended"
                    else:
                        self.trainer_is_idle = True
                    break
                case _:
                    self._recorder.handle(message)
            self._run_due_work()
        self._recorder.flush()

    def _next_message(self) -> FromTrainer | Ended | WakeUp | None:
        """The next message, or None when work is due before one comes."""
        due = [self._lease.heartbeat_due]
        due += [at for at in (self._kill_at, self._poll_due, self._recorder.due) if at is not None]
        due += [self._stalled_at] if self._crash is None else []
        return self._trainer.next_message(max(0.0, min(due) - time.monotonic()))

    # -- Due work -------------------------------------------------------------------------------------------------

    def _run_due_work(self) -> None:
        now = time.monotonic()
        if self._recorder.due is not None and now >= self._recorder.due:
            self._recorder.flush()
        if self._poll_due is not None and now >= self._poll_due:
            self._poll()
        self._heartbeat_when_due()
        if self._crash is None and now >= self._stalled_at:
            self._crash = f"stalled: no step in {now - self._recorder.last_progress:.0f} s"
            self._log.error("trainer_stalled", crash=self._crash)
            self._trainer.kill()
        if self._kill_at is not None and now >= self._kill_at:
            self._log.warning("trainer_killed", asked_to=self._stopping)
            self._kill_at = None
            self._trainer.kill()

    def _heartbeat_when_due(self) -> None:
        if time.monotonic() >= self._lease.heartbeat_due:
            self._recorder.write(lambda: recording.heartbeat(self._db, self._claim))

    def _poll(self) -> None:
        """Read cancel and pause requests now: the next write, which returns them too, may be seconds away."""
        self._poll_due, self._last_poll = None, time.monotonic()
        if self._draining.is_set():
            self._request_stop("drain")
        try:
            job = reads.get_job(self._db, self._job.id)
        except DatabaseUnavailable:
            return  # the next heartbeat logs it, and retries
        if job.fence != self._claim.fence or job.status != "running":
            raise LeaseLost(f"job {job.id} is {job.status} under fence {job.fence}")
        self._apply(Intents(job.cancel_requested_at is not None, job.pause_requested_at is not None))

    def _apply(self, intents: Intents) -> None:
        if intents.cancel:
            self._request_stop("cancel")
        elif intents.pause:
            self._request_stop("pause")

    def _request_stop(self, reason: StopReason) -> None:
        """Ask the trainer to stop at the next step boundary; after a grace period it is killed."""
        if self._force_stop.is_set():
            self._kill_within(0)
        if _PRECEDENCE[reason] > _PRECEDENCE[self._stopping]:
            self._log.info("trainer_asked_to_stop", reason=reason)
            self._stopping = reason
            self._trainer.send(Stop(reason=reason))
            self._trainer.wake()
            self._kill_within(self._timing.cancel_grace if reason == "cancel" else self._timing.stop_grace)

    def _kill_within(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self._kill_at = at if self._kill_at is None else min(at, self._kill_at)

    @property
    def _stalled_at(self) -> float:
        """Monotonic time at which a trainer without progress counts as stalled."""
        limit = max(self._timing.stall, self._timing.stall_steps * self._recorder.median_step_seconds)
        return self._recorder.last_progress + limit

    # -- The end ---------------------------------------------------------------------------------------------------

    def _end_processes_left(self) -> None:
        """Return once nothing of the job is left: its trainer is idle and no process lives that it started, or none of
        its processes lives. Heartbeats keep the job this worker's meanwhile."""
        self._lock.close()
        self.trainer_is_idle = self.trainer_is_idle and self._trainer.is_alone()
        if self.trainer_is_idle:
            return
        while not self._trainer.kill_and_reap(self._timing.heartbeat):
            try:
                self._lease.write(lambda: recording.heartbeat(self._db, self._claim))
            except LeaseLost:
                self._lost = True
            except (LeaseUncertain, StorageFull):
                continue  # the trainer still has to be killed

    def _settle(self) -> None:
        """Record the job's next status. No process of it is left."""
        try:
            job = self._lease.final_write(self._transition(), self._force_stop)
        except LeaseLost as error:
            self._log.warning("lease_lost", reason=str(error))
            return
        if job is not None:
            if job.status in TERMINAL:
                self._recorder.drop_snapshot()
            self._log.info("attempt_ended", status=job.status, status_reason=job.status_reason, error=job.error)

    def _transition(self) -> Callable[[], Job]:
        """The write that records the job's next status."""
        db, claim = self._db, self._claim
        match self._done:
            case None if self._lease.is_uncertain:
                return lambda: queue.release(db, claim)
            case Done(outcome="succeeded"):
                recorder = self._recorder
                return lambda: queue.finish(
                    db, claim, "succeeded", reason=recorder.stopped_early_reason, progress=recorder.progress
                )
            case Done(outcome="failed", error=Failure(code="disk_full", message=message)):
                return lambda: queue.release(db, claim, pause_reason=message)
            case Done(outcome="failed", error=Failure(code="storage_failed", message=message)):
                return self._transition_external(message)
            case Done(outcome="failed", error=error):
                assert error is not None, "a failure has an error"
                return lambda: queue.finish(db, claim, "failed", error=error.model_dump())
            case Done(outcome="stopped"):
                return lambda: queue.release(db, claim)
        if self._disk_full:
            return lambda: queue.release(db, claim, pause_reason="the disk is full")
        if self._crash is None and self._stopping is not None:
            return lambda: queue.release(db, claim)  # it was killed because it did not stop in time
        if self._external_cause is not None:
            return self._transition_external(self._external_cause)
        if self._crash is None and -self._trainer.exit_status in TERMINATION_SIGNALS:
            return self._transition_external(_describe(self._trainer.exit_status))
        killed = self._crash is None and self._trainer.exit_status == -signal.SIGKILL
        if killed and oom_kills() > self._oom_kills:
            return self._transition_out_of_memory()
        if killed and self._trainer_timed_out:
            return self._transition_external(
                "the trainer received no keep-alive from its worker for too long and killed itself"
            )
        crash = self._crash or _describe(self._trainer.exit_status)
        self._log.error("trainer_crashed", crash=crash)
        return lambda: queue.release(db, claim, crash=crash)

    def _transition_external(self, reason: str) -> Callable[[], Job]:
        """The cause is not the job: it is tried again, and no crash is counted."""
        self._log.error("attempt_ended_by_external_cause", reason=reason)
        return lambda: queue.release(self._db, self._claim, external_cause=reason)

    def _transition_out_of_memory(self) -> Callable[[], Job]:
        """The kernel's out-of-memory kill is handled as torch's own out-of-memory error: the micro-batch is halved
        where that is possible."""
        db, claim, prepared = self._db, self._claim, self._recorder.prepared
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
            error = {"code": refusal.code, "message": message}
            return lambda: queue.finish(db, claim, "failed", error=error)
        step = self._recorder.progress["step"]
        self._log.warning("trainer_out_of_memory", step=step, micro_batch=size)
        halved = (
            f"after step {step}, with micro-batches of {size} windows, the system killed the trainer because memory "
            f"ran out; from now on they have {half}: a step trains on the same windows in more parts"
        )
        return lambda: queue.release_out_of_memory(
            db,
            claim,
            micro_batch=half,
            reason=f"memory ran out, goes on with micro-batches of {half} windows",
            warnings=[
                {"code": "micro_batch_halved", "message": halved},
                {"code": "resume_not_exact", "message": "sums over smaller micro-batches are rounded otherwise"},
            ],
        )


def _describe(exit_status: int) -> str:
    if exit_status < 0:
        return f"the trainer was killed by {signal.Signals(-exit_status).name}"
    return f"the trainer ended with status {exit_status} before it was done"
