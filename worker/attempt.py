"""One attempt at a job, from the claim to the job's next state: what the trainer says is recorded under the claim's
fence, what the user wishes is passed on to the trainer.

Knows no HTTP and no torch. A lost lease ends the attempt at once, and it writes nothing more.
"""

import errno
import shutil
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any, assert_never

import structlog

from service import queue, store
from service.errors import DatabaseUnavailable, LeaseLost, StorageFull
from service.queue import Intents
from service.settings import Settings
from service.store import Job
from worker.lease import Lease, LeaseUncertain
from worker.memory import oom_kills
from worker.process import Ended, Look, TrainerProcess
from worker.protocol import (
    CheckpointWritten,
    Done,
    Failure,
    FromTrainer,
    Prepared,
    Ready,
    SnapshotWritten,
    Steps,
    Stop,
    StopReason,
    Warned,
)
from worker.start import ParentUnusable, compose
from worker.timing import Timing

log = structlog.get_logger(__name__)

_RANK = {None: 0, "drain": 1, "pause": 2, "cancel": 3}
"""Which wish beats which."""


class Attempt:
    """A claim and a warm trainer, brought together."""

    def __init__(
        self,
        db: store.Database,
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
        self._oom_kills = oom_kills()

        self._progress: dict[str, Any] = dict(self._job.progress)
        self._snapshot_folder: str | None = None
        """Of the recorded snapshot, relative to the data folder."""
        self._unrecorded: dict[str, list[Any]] = {}
        """Step figures that wait for the next commit."""
        self._record_due = 0.0
        self._look_due: float | None = None
        self._last_look = 0.0
        self._last_progress = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=100)

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
            self._disk_full = isinstance(error, StorageFull) or getattr(error, "errno", None) == errno.ENOSPC
            self._crash = f"the supervisor failed: {error!r}"
            self._log.exception("attempt_failed")
        self._bury()
        if not self._lost:
            self._settle()

    # -- The conversation ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._log.info("attempt_started", attempt=self._job.attempt)
        start, warnings = self._lease.read(
            lambda: compose(self._db, self._job, device=self._device, settings=self._settings)
        )
        if start.resume is not None:
            self._snapshot_folder = self._relative(Path(start.resume.folder).name)
        self._trainer.start(start)
        for warning in warnings:
            self._record(warning)

    def _follow(self) -> None:
        """Until the trainer has ended: record what it says, keep the lease, pass on what is wished."""
        while True:
            match message := self._next_message():
                case Ended(garbled=garbled):
                    self._crash = self._crash or ("the trainer said what is not the protocol" if garbled else None)
                    break
                case None | Ready():
                    pass
                case Look():
                    self._look_due = self._look_due or max(time.monotonic(), self._last_look + self._timing.look)
                case Done():
                    self._done = message
                    self._kill_within(self._timing.exit_grace)
                case _:
                    self._hear(message)
            self._do_what_is_due()
        self._record_steps()

    def _next_message(self) -> FromTrainer | Ended | Look | None:
        due = [self._lease.heartbeat_due]
        due += [at for at in (self._kill_at, self._look_due) if at is not None]
        due += [self._record_due] if self._unrecorded else []
        due += [self._last_progress + self._patience()] if self._crash is None else []
        try:
            return self._trainer.inbox.get(timeout=max(0.0, min(due) - time.monotonic()))
        except Empty:
            return None

    def _hear(self, message: Prepared | Steps | CheckpointWritten | SnapshotWritten | Warned) -> None:
        now = time.monotonic()
        if isinstance(message, Steps):
            self._step_seconds.append((now - self._last_progress) / len(message.step))
            self._gather(message)
        else:
            self._record_steps()  # what is recorded keeps the order in which it happened
            self._record(message)
        self._last_progress = now

    def _record(self, message: Prepared | CheckpointWritten | SnapshotWritten | Warned) -> None:
        db, claim = self._db, self._claim
        match message:
            case Prepared():
                self._begin(message)
            case CheckpointWritten():
                self._log.info("checkpoint", percent=message.percent, step=message.step)
                self._write(
                    lambda: queue.record_checkpoint(
                        db,
                        claim,
                        percent=message.percent,
                        step=message.step,
                        epoch=message.epoch,
                        folder=self._relative(message.folder),
                        manifest_sha256=message.manifest_sha256,
                        files=[file.model_dump() for file in message.files],
                        metrics=message.metrics,
                        progress=self._progress,
                    )
                )
            case SnapshotWritten():
                self._keep_snapshot(message)
            case Warned():
                warning = {"code": message.code, "message": message.message}
                self._write(lambda: queue.record_event(db, claim, "warning", warning))
            case _:
                assert_never(message)

    def _begin(self, prepared: Prepared) -> None:
        """Record what was decided, and make the step series end where training goes on."""
        db, claim = self._db, self._claim
        self._write(
            lambda: queue.record_prepared(
                db,
                claim,
                execution=prepared.execution,
                n_tokens=prepared.n_tokens,
                total_steps=prepared.total_steps,
                model={"n_params": prepared.n_params, "n_active_params": prepared.n_active_params},
                warnings=[warning.model_dump() for warning in prepared.warnings],
            )
        )
        step = prepared.resumed_at_step or 0
        if claim.job.attempt > 1:
            self._write(lambda: queue.rewind(db, claim, step))
            resumed = {"code": "resumed", "message": f"attempt {claim.job.attempt} goes on from step {step}"}
            self._write(lambda: queue.record_event(db, claim, "warning", resumed))
        self._progress = {
            "step": step,
            "total_steps": prepared.total_steps,
            "epoch": self._progress.get("epoch", 0) if step else 0,
            "percent": _percent(step, prepared.total_steps),
        }
        self._write(lambda: queue.heartbeat(db, claim, self._progress))

    def _gather(self, steps: Steps) -> None:
        first = not self._unrecorded
        for name, figures in steps.columns.items():
            self._unrecorded.setdefault(name, []).extend(figures)
        step, total = steps.step[-1], self._progress["total_steps"]
        self._progress = {
            "step": step,
            "total_steps": total,
            "epoch": steps.epoch,
            "percent": _percent(step, total),
            "tok_per_sec": steps.tok_per_sec,
            "eta_seconds": (total - step) * statistics.median(self._step_seconds),
        }
        if first:
            self._record_due = max(self._record_due, time.monotonic())
            self._on_training()

    def _record_steps(self) -> None:
        if self._unrecorded:
            steps, self._unrecorded = self._unrecorded, {}
            self._write(lambda: queue.record_steps(self._db, self._claim, steps, self._progress))
            self._record_due = time.monotonic() + self._timing.record

    def _keep_snapshot(self, message: SnapshotWritten) -> None:
        """Record it in place of the one before, whose files nobody needs then."""
        db, claim, folder = self._db, self._claim, self._relative(message.folder)
        self._write(
            lambda: queue.record_snapshot(
                db, claim, step=message.step, folder=folder, manifest_sha256=message.manifest_sha256
            )
        )
        before, self._snapshot_folder = self._snapshot_folder, folder
        if before is not None:
            shutil.rmtree(self._settings.data_dir / before, ignore_errors=True)

    def _write(self, write: Callable[[], Intents]) -> None:
        self._obey(self._lease.write(write))

    def _relative(self, folder: str) -> str:
        return f"{store.job_folder(self._job.id)}/{folder}"

    # -- What is due -----------------------------------------------------------------------------------------------

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._unrecorded and now >= self._record_due:
            self._record_steps()
        if self._look_due is not None and now >= self._look_due:
            self._look()
        if now >= self._lease.heartbeat_due:
            self._write(lambda: queue.heartbeat(self._db, self._claim))
        if self._crash is None and now >= self._last_progress + self._patience():
            self._crash = f"stalled: no step in {now - self._last_progress:.0f} s"
            self._log.error("trainer_stalled", crash=self._crash)
            self._trainer.kill()
        if self._kill_at is not None and now >= self._kill_at:
            self._log.warning("trainer_killed", asked_to=self._stopping)
            self._kill_at = None
            self._trainer.kill()

    def _look(self) -> None:
        """Read what is wished: something was committed, and the next write may be seconds away."""
        self._look_due, self._last_look = None, time.monotonic()
        if self._draining.is_set():
            self._ask("drain")
        try:
            job = store.get_job(self._db, self._job.id)
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

    def _patience(self) -> float:
        """Seconds without progress after which a trainer is stalled."""
        median = statistics.median(self._step_seconds) if self._step_seconds else 0.0
        return max(self._timing.stall, self._timing.stall_steps * median)

    # -- The end ---------------------------------------------------------------------------------------------------

    def _bury(self) -> None:
        """Return once no process of the job is left; the job stays ours meanwhile."""
        while not self._trainer.bury(self._timing.heartbeat):
            try:
                self._lease.write(lambda: queue.heartbeat(self._db, self._claim))
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
            self._log.info("attempt_ended", status=job.status, status_reason=job.status_reason, error=job.error)

    def _transition(self) -> Callable[[], Job]:
        """What becomes of the job."""
        db, claim = self._db, self._claim
        match self._done:
            case None if self._lease.is_uncertain:
                return lambda: queue.release(db, claim)
            case Done(outcome="succeeded"):
                return lambda: queue.finish(db, claim, "succeeded", progress=self._progress)
            case Done(outcome="failed", error=Failure(code="disk_full", message=message)):
                return lambda: queue.release(db, claim, pause_reason=message)
            case Done(outcome="failed", error=error):
                assert error is not None, "a failure has an error"
                return lambda: queue.finish(db, claim, "failed", error=error.model_dump())
            case Done(outcome="stopped"):
                return lambda: queue.release(db, claim)
        if self._disk_full:
            return lambda: queue.release(db, claim, pause_reason="the disk is full")
        if self._crash is None and self._stopping is not None:
            return lambda: queue.release(db, claim)  # it was killed because it did not obey in time
        if self._trainer.exit_status == -signal.SIGKILL and oom_kills() > self._oom_kills:
            message = "the system killed the trainer because memory ran out"
            return lambda: queue.finish(db, claim, "failed", error={"code": "out_of_memory", "message": message})
        crash = self._crash or _describe(self._trainer.exit_status)
        self._log.error("trainer_crashed", crash=crash)
        return lambda: queue.release(db, claim, crash=crash)


def _percent(step: int, total: int) -> float:
    return round(100 * step / total, 2)


def _describe(exit_status: int) -> str:
    if exit_status < 0:
        return f"the trainer was ended by {signal.Signals(-exit_status).name}"
    return f"the trainer ended with status {exit_status} before it was done"
