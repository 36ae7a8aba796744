"""One attempt at a job, from the claim to the job's next state: it starts the trainer, has recorded what the trainer
says, passes on what the user wishes, and ends the trainer when it must.

Knows no HTTP and no torch. A lost lease ends the attempt at once, and it writes nothing more.
"""

import signal
import threading
import time
from collections.abc import Callable

import structlog

from nanomoe.checkpoint import is_disk_full
from nanomoe.config import JobConfig
from nanomoe.plan import OutOfMemory, Plan
from service.database.database import Database
from service.errors import DatabaseUnavailable, LeaseLost, StorageFull
from service.jobs import queue, reads, recording
from service.jobs.lease import Intents
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Job
from service.settings import Settings
from worker.lease import Lease, LeaseUncertain
from worker.memory import oom_kills
from worker.process import Ended, Look, TrainerProcess
from worker.protocol import Done, Failure, FromTrainer, Ready, Steps, Stop, StopReason
from worker.recorder import Recorder
from worker.start import ParentUnusable, compose
from worker.timing import Timing

log = structlog.get_logger(__name__)

OUTSIDE = (OSError, MemoryError, DatabaseUnavailable)
"""What fails a supervisor for a reason that is not the job's: the data folder is away, or the process has no descriptor
and no memory left."""

ASKED_TO_END = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
"""Signals with which somebody asks a process to end: the system that shuts down, or a person. No fault sends one."""

_RANK = {None: 0, "drain": 1, "pause": 2, "cancel": 3}
"""Which wish beats which."""


class Attempt:
    """A claim and a warm trainer, brought together."""

    def __init__(
        self,
        db: Database,
        lease: Lease,
        trainer: TrainerProcess,
        *,
        device: str,
        settings: Settings,
        timing: Timing,
        draining: threading.Event,
        hurry: threading.Event,
        on_training: Callable[[], None],
    ) -> None:
        """`draining`: the worker should end soon; `hurry`: at once. `on_training` is called once steps are done."""
        self._db = db
        self._lease = lease
        self._claim = lease.claim
        self._job = lease.claim.job
        self._trainer = trainer
        self._device = device
        self._settings = settings
        self._timing = timing
        self._draining = draining
        self._hurry = hurry
        self._on_training = on_training
        self._log = log.bind(job=self._job.id, fence=self._claim.fence, trainer=trainer.pid)

        self._done: Done | None = None
        """The trainer's last word."""
        self._stopping: StopReason | None = None
        """Why the trainer was asked to stop."""
        self._kill_at: float | None = None
        """Monotonic time at which asking ends."""
        self._lost = False
        """Whether the job is somebody else's."""
        self._disk_full = False
        self._crash: str | None = None
        """How the attempt went wrong, where the trainer's exit status does not tell."""
        self._outside: str | None = None
        """How it went wrong for a reason that is not the job's."""
        self._unheard = False
        """Whether the trainer ended when it had heard no beat for so long that it ends itself."""
        self._oom_kills = oom_kills()

        self._look_due: float | None = 0.0
        """Monotonic time of the next look at what is wished."""
        self._last_look = 0.0
        self._recorder = Recorder(db, lease, settings.data_dir, timing, self._obey)

    def run(self) -> None:
        """See the job through until no process of it is left, and put it where it belongs then."""
        try:
            self._start()
            self._follow()
        except LeaseLost as error:
            self._log.warning("lease_lost", reason=str(error))
            self._lost = True
        except LeaseUncertain:
            self._log.warning("lease_uncertain")
            self._done = None  # it may have been said, but not all of it is recorded
        except ParentUnusable as error:
            self._done = Done(outcome="failed", error=Failure(code=error.code, message=str(error)))
        except Exception as error:
            # Whatever it is, the trainer must not outlive it, and the next job must not suffer from it.
            self._disk_full = isinstance(error, StorageFull) or is_disk_full(error)
            reason = f"the supervisor failed: {error!r}"
            if isinstance(error, OUTSIDE):
                self._outside = reason
            else:
                self._crash = reason
            self._log.exception("attempt_failed")
        self._bury()
        if not self._lost:
            self._settle()

    # -- The conversation ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._log.info("attempt_started", attempt=self._job.attempt)
        start, snapshot_folder, warnings = self._lease.read(
            lambda: compose(
                self._db, self._job, device=self._device, settings=self._settings, meanwhile=self._beat_when_due
            )
        )
        self._recorder.snapshot_folder = snapshot_folder
        self._trainer.start(start)
        for warning in warnings:
            self._recorder.hear(warning)

    def _follow(self) -> None:
        """Until the trainer has ended: have recorded what it says, and do what is due meanwhile."""
        while True:
            match message := self._next_message():
                case Ended(garbled=garbled, unheard=unheard):
                    self._crash = self._crash or ("the trainer said what is not the protocol" if garbled else None)
                    self._unheard = unheard
                    break
                case None | Ready():
                    pass
                case Look():
                    self._look_due = self._look_due or max(time.monotonic(), self._last_look + self._timing.look)
                case Done():
                    self._done = message
                    self._kill_within(self._timing.exit_grace)
                case _:
                    self._recorder.hear(message)
                    if isinstance(message, Steps):
                        self._on_training()
            self._do_what_is_due()
        self._recorder.flush()

    def _next_message(self) -> FromTrainer | Ended | Look | None:
        """What comes next, or None when something is due before."""
        due = [self._lease.heartbeat_due]
        due += [at for at in (self._kill_at, self._look_due, self._recorder.due) if at is not None]
        due += [self._stalled_at] if self._crash is None else []
        return self._trainer.next_message(max(0.0, min(due) - time.monotonic()))

    # -- What is due -----------------------------------------------------------------------------------------------

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._recorder.due is not None and now >= self._recorder.due:
            self._recorder.flush()
        if self._look_due is not None and now >= self._look_due:
            self._look()
        self._beat_when_due()
        if self._crash is None and now >= self._stalled_at:
            self._crash = f"stalled: no step in {now - self._recorder.last_progress:.0f} s"
            self._log.error("trainer_stalled", crash=self._crash)
            self._trainer.kill()
        if self._kill_at is not None and now >= self._kill_at:
            self._log.warning("trainer_killed", asked_to=self._stopping)
            self._kill_at = None
            self._trainer.kill()

    def _beat_when_due(self) -> None:
        if time.monotonic() >= self._lease.heartbeat_due:
            self._recorder.write(lambda: recording.heartbeat(self._db, self._claim))

    def _look(self) -> None:
        """Read what is wished: something was committed, and the next write may be seconds away."""
        self._look_due, self._last_look = None, time.monotonic()
        if self._draining.is_set():
            self._ask("drain")
        try:
            job = reads.get_job(self._db, self._job.id)
        except DatabaseUnavailable:
            return  # the next heartbeat says so, and keeps trying
        if job.fence != self._claim.fence or job.status != "running":
            raise LeaseLost(f"job {job.id} is {job.status} under fence {job.fence}")
        self._obey(Intents(job.cancel_requested_at is not None, job.pause_requested_at is not None))

    def _obey(self, intents: Intents) -> None:
        if intents.cancel:
            self._ask("cancel")
        elif intents.pause:
            self._ask("pause")

    def _ask(self, reason: StopReason) -> None:
        """Ask the trainer to stop at the next step boundary, and give it a while."""
        if self._hurry.is_set():
            self._kill_within(0)
        if _RANK[reason] > _RANK[self._stopping]:
            self._log.info("trainer_asked_to_stop", reason=reason)
            self._stopping = reason
            self._trainer.send(Stop(reason=reason))
            self._trainer.terminate()
            self._kill_within(self._timing.cancel_grace if reason == "cancel" else self._timing.stop_grace)

    def _kill_within(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self._kill_at = at if self._kill_at is None else min(at, self._kill_at)

    @property
    def _stalled_at(self) -> float:
        """Monotonic time at which a trainer that tells nothing counts as stalled."""
        patience = max(self._timing.stall, self._timing.stall_steps * self._recorder.median_step_seconds)
        return self._recorder.last_progress + patience

    # -- The end ---------------------------------------------------------------------------------------------------

    def _bury(self) -> None:
        """Return once no process of the job is left; the job stays ours meanwhile."""
        while not self._trainer.bury(self._timing.heartbeat):
            try:
                self._lease.write(lambda: recording.heartbeat(self._db, self._claim))
            except LeaseLost:
                self._lost = True
            except (LeaseUncertain, StorageFull):
                continue  # what is left of the trainer still has to go

    def _settle(self) -> None:
        """From running to where the job belongs. Nothing of it lives any more."""
        try:
            job = self._lease.insist(self._transition(), self._hurry)
        except LeaseLost as error:
            self._log.warning("lease_lost", reason=str(error))
            return
        if job is not None:
            if job.status in TERMINAL:
                self._recorder.drop_snapshot()
            self._log.info("attempt_ended", status=job.status, status_reason=job.status_reason, error=job.error)

    def _transition(self) -> Callable[[], Job]:
        """What becomes of the job."""
        db, claim = self._db, self._claim
        match self._done:
            case None if self._lease.is_uncertain:
                return lambda: queue.release(db, claim)
            case Done(outcome="succeeded"):
                recorder = self._recorder
                return lambda: queue.finish(
                    db, claim, "succeeded", reason=recorder.stopped_early, progress=recorder.progress
                )
            case Done(outcome="failed", error=Failure(code="disk_full", message=message)):
                return lambda: queue.release(db, claim, pause_reason=message)
            case Done(outcome="failed", error=Failure(code="storage_failed", message=message)):
                return self._transition_outside(message)
            case Done(outcome="failed", error=error):
                assert error is not None, "a failure has an error"
                return lambda: queue.finish(db, claim, "failed", error=error.model_dump())
            case Done(outcome="stopped"):
                return lambda: queue.release(db, claim)
        if self._disk_full:
            return lambda: queue.release(db, claim, pause_reason="the disk is full")
        if self._crash is None and self._stopping is not None:
            return lambda: queue.release(db, claim)  # it was killed because it did not obey in time
        if self._outside is not None:
            return self._transition_outside(self._outside)
        if self._crash is None and -self._trainer.exit_status in ASKED_TO_END:
            return self._transition_outside(_describe(self._trainer.exit_status))
        killed = self._crash is None and self._trainer.exit_status == -signal.SIGKILL
        if killed and oom_kills() > self._oom_kills:
            return self._transition_out_of_memory()
        if killed and self._unheard:
            return self._transition_outside("the trainer heard nothing from its worker for too long and ended itself")
        crash = self._crash or _describe(self._trainer.exit_status)
        self._log.error("trainer_crashed", crash=crash)
        return lambda: queue.release(db, claim, crash=crash)

    def _transition_outside(self, reason: str) -> Callable[[], Job]:
        """The job is not to blame: it is tried again, however often that happens."""
        self._log.error("attempt_ended_from_outside", reason=reason)
        return lambda: queue.release(self._db, self._claim, outside=reason)

    def _transition_out_of_memory(self) -> Callable[[], Job]:
        """The system's killing is like a refusal that torch itself sees: the micro-batch is halved where it can be."""
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
        return f"the trainer was ended by {signal.Signals(-exit_status).name}"
    return f"the trainer ended with status {exit_status} before it was done"
