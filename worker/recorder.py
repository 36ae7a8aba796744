"""Writes a trainer's messages to the database: steps gathered into batches, which a checkpoint completes, everything
else at once, in order.

Decides neither when to stop nor the job's next state. Every write goes through the lease.
"""

import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

import structlog

from nanomoe import checkpoint
from service.database.database import Database
from service.jobs import recording
from service.jobs.lease import Intents
from service.storage.job_folders import job_folder
from worker.held_lease import Lease
from worker.protocol import CheckpointWritten, Prepared, SnapshotWritten, Steps, Warned
from worker.timing import Timing

log = structlog.get_logger(__name__)

Update = Prepared | Steps | CheckpointWritten | SnapshotWritten | Warned
"""The trainer's messages about a job that it trains."""


class Recorder:
    """The job's rows, as far as this attempt writes them."""

    def __init__(
        self, db: Database, lease: Lease, data_dir: Path, timing: Timing, on_intents: Callable[[Intents], None]
    ) -> None:
        """`on_intents` is called after every write with the job's cancel and pause requests."""
        self._db = db
        self._lease = lease
        self._claim = lease.claim
        self._data_dir = data_dir
        self._timing = timing
        self._on_intents = on_intents
        self.progress: dict[str, Any] = dict(lease.claim.job.progress)
        self.prepared: Prepared | None = None
        """The trainer's `Prepared` message, once it has come."""
        self.micro_batch = 0
        """Windows of a micro-batch, once the trainer has decided them."""
        self.snapshot_folder: str | None = None
        """Folder of the recorded snapshot, relative to the data folder."""
        self.stopped_early_reason: str | None = None
        """Why training ended before its last step, if it did."""
        self._steps: dict[str, list[Any]] = {}
        """Step figures that wait for the next commit."""
        self._last_commit = 0.0
        self.last_progress = time.monotonic()
        """Monotonic time of the trainer's latest message."""
        self._step_seconds: deque[float] = deque(maxlen=100)

    @property
    def due(self) -> float | None:
        """Monotonic time at which `flush` should be called; None while nothing waits."""
        return self._last_commit + self._timing.record if self._steps else None

    @property
    def median_step_seconds(self) -> float:
        """Median time of the last steps, in seconds; 0 before there are any."""
        return statistics.median(self._step_seconds) if self._step_seconds else 0.0

    def handle(self, message: Update) -> None:
        """Write a message to the database; steps wait for the next batch."""
        now = time.monotonic()
        if isinstance(message, Steps):
            self._step_seconds.append((now - self.last_progress) / len(message.step))
            self._gather(message)
        elif isinstance(message, CheckpointWritten):
            self._add_checkpoint(message, self._take_steps())
        else:
            self.flush()
            self._record(message)
        self.last_progress = now

    def flush(self) -> None:
        """Commit the steps that wait."""
        if self._steps:
            steps = self._take_steps()
            self.write(lambda: recording.record_steps(self._db, self._claim, steps, self.progress))

    def _take_steps(self) -> dict[str, list[Any]]:
        """The steps that wait, for the write that follows."""
        steps, self._steps = self._steps, {}
        if steps:
            self._last_commit = time.monotonic()
        return steps

    def write(self, write: Callable[[], Intents]) -> None:
        """Do one write under the lease, and pass on the requests that it returns."""
        self._on_intents(self._lease.write(write))

    def _gather(self, steps: Steps) -> None:
        for name, figures in steps.columns.items():
            self._steps.setdefault(name, []).extend(figures)
        step, total = steps.step[-1], self.progress["total_steps"]
        self.progress = {
            "step": step,
            "total_steps": total,
            "epoch": steps.epoch,
            "percent": _percent(step, total),
            "tok_per_sec": steps.tok_per_sec,
            "eta_seconds": (total - step) * self.median_step_seconds,
        }

    def _record(self, message: Prepared | SnapshotWritten | Warned) -> None:
        match message:
            case Prepared():
                self._begin(message)
            case SnapshotWritten():
                self._replace_snapshot(message)
            case Warned():
                if message.micro_batch is not None:
                    self._keep_micro_batch(message.micro_batch)
                warning = {"code": message.code, "message": message.message}
                self.write(lambda: recording.record_event(self._db, self._claim, "warning", warning))
            case _:
                assert_never(message)

    def _begin(self, prepared: Prepared) -> None:
        """Record the trainer's decisions, and cut the step series where training resumes."""
        db, claim = self._db, self._claim
        log.info("job_prepared", job=claim.job_id, **prepared.execution)
        self.prepared, self.micro_batch = prepared, prepared.execution["micro_batch"]
        step = prepared.resumed_at_step or 0
        self.progress = {
            "step": step,
            "total_steps": prepared.total_steps,
            "epoch": self.progress.get("epoch", 0) if step else 0,
            "percent": _percent(step, prepared.total_steps),
        }
        self.write(
            lambda: recording.record_prepared(
                db,
                claim,
                execution=prepared.execution,
                n_tokens=prepared.n_tokens,
                total_steps=prepared.total_steps,
                model={"n_params": prepared.n_params, "n_active_params": prepared.n_active_params},
                warnings=[warning.model_dump() for warning in prepared.warnings],
                progress=self.progress,
            )
        )
        if claim.job.attempt > 1:
            self.write(lambda: recording.rewind(db, claim, step))
            resumed = {"code": "resumed", "message": f"attempt {claim.job.attempt} goes on from step {step}"}
            self.write(lambda: recording.record_event(db, claim, "warning", resumed))

    def _keep_micro_batch(self, micro_batch: int) -> None:
        """Record the smaller micro-batch, so that a later attempt does not run out of memory again."""
        self.micro_batch = micro_batch
        self.write(lambda: recording.record_micro_batch(self._db, self._claim, micro_batch))

    def _add_checkpoint(self, message: CheckpointWritten, steps: dict[str, list[Any]]) -> None:
        metrics = message.metrics
        log.info("checkpoint_written", job=self._claim.job_id, percent=metrics.percent, step=metrics.step)
        self.write(
            lambda: recording.record_checkpoint(
                self._db,
                self._claim,
                percent=metrics.percent,
                step=metrics.step,
                epoch=metrics.epoch,
                folder=self._relative(message.folder),
                manifest_sha256=message.manifest_sha256,
                files=[file.model_dump() for file in message.files],
                metrics=metrics.to_row() | {"tok_per_sec": message.tok_per_sec},
                steps=steps,
                progress=self.progress,
            )
        )
        if metrics.stopped_early:
            self.stopped_early_reason = checkpoint.stopped_early_reason(metrics)

    def _replace_snapshot(self, message: SnapshotWritten) -> None:
        """Record a snapshot in place of the previous one, whose files are then removed."""
        folder = self._relative(message.folder)
        self.write(
            lambda: recording.record_snapshot(
                self._db, self._claim, step=message.step, folder=folder, manifest_sha256=message.manifest_sha256
            )
        )
        before, self.snapshot_folder = self.snapshot_folder, folder
        if before is not None:
            shutil.rmtree(self._data_dir / before, ignore_errors=True)

    def drop_snapshot(self) -> None:
        """Remove the files of a job's snapshot once its end is recorded: it is not resumed any more."""
        if self.snapshot_folder is not None:
            shutil.rmtree(self._data_dir / self.snapshot_folder, ignore_errors=True)

    def _relative(self, folder: str) -> str:
        return f"{job_folder(self._claim.job_id)}/{folder}"


def _percent(step: int, total: int) -> float:
    return round(100 * step / total, 2)
