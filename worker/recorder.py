"""Turns a trainer's messages into what is to be recorded of its job: steps gathered into batches, which a checkpoint
completes, everything else in order. What waits is written together with what other jobs have (`attempts.py`).

Decides neither when to write or to stop nor the job's next state, and knows no database.
"""

import statistics
import time
from collections import deque
from typing import Any, assert_never

import structlog

from nanomoe import checkpoint
from nanomoe.store.store import Store
from service.jobs import recording
from service.jobs.lease import Claim
from service.jobs.recording import Report
from service.storage.job_folders import job_folder
from worker.protocol import CheckpointWritten, Prepared, SnapshotWritten, Steps, Warned
from worker.removal import remove_when_possible

log = structlog.get_logger(__name__)

Update = Prepared | Steps | CheckpointWritten | SnapshotWritten | Warned
"""The trainer's messages about a job that it trains."""


class Recorder:
    """What this attempt adds to the job's rows."""

    def __init__(self, claim: Claim, store: Store) -> None:
        self._claim = claim
        self._store = store
        self.progress: dict[str, Any] = dict(claim.job.progress)
        self.prepared: Prepared | None = None
        """The trainer's `Prepared` message, once it has come."""
        self.micro_batch = 0
        """Windows of a micro-batch, once the trainer has decided them."""
        self.snapshot_folder: str | None = None
        """Folder of the newest snapshot, relative to the store."""
        self.stopped_early_reason: str | None = None
        """Why training ended before its last step, if it did."""
        self._waiting: list[Report] = []
        """What is to be written but the steps that follow it."""
        self._n_taken = 0
        """How many of these `waiting` has returned."""
        self._steps: dict[str, list[Any]] = {}
        """Step figures that wait for the next write."""
        self._replaced: list[str] = []
        """Folders of snapshots that are not needed any more once all that waits is recorded."""
        self.last_progress = time.monotonic()
        """Monotonic time of the trainer's latest message."""
        self._step_seconds: deque[float] = deque(maxlen=100)
        self.median_step_seconds = 0.0
        """Median time of the last steps, in seconds; 0 before there are any."""

    @property
    def has_steps(self) -> bool:
        """Whether steps wait, which may wait for others."""
        return bool(self._steps)

    @property
    def is_urgent(self) -> bool:
        """Whether anything else waits."""
        return bool(self._waiting)

    def handle(self, message: Update) -> None:
        """Take in a message."""
        now = time.monotonic()
        match message:
            case Steps():
                self._step_seconds.append((now - self.last_progress) / len(message.step))
                self.median_step_seconds = statistics.median(self._step_seconds)
                self._gather(message)
            case CheckpointWritten():
                self._add_checkpoint(message)
            case Prepared():
                self._begin(message)
            case SnapshotWritten():
                self._replace_snapshot(message)
            case Warned():
                if message.micro_batch is not None:
                    self._keep_micro_batch(message.micro_batch)
                warning = {"code": message.code, "message": message.message}
                self._add(recording.event_report(self._claim, "warning", warning))
            case _:
                assert_never(message)
        self.last_progress = now

    def waiting(self, most_steps: int) -> Report | None:
        """The first of all that waits, with at most so many steps, as one report; None where nothing waits. It waits on
        until it is `recorded`."""
        self._close_batch()
        self._n_taken = 0
        for report in self._waiting:
            n_steps = len(report.steps["step"]) if report.steps else 0
            if n_steps > most_steps:
                if self._n_taken == 0:
                    self._split_first(most_steps)
                    self._n_taken = 1
                break
            most_steps -= n_steps
            self._n_taken += 1
        return Report.merged(self._waiting[: self._n_taken]) if self._n_taken else None

    def recorded(self) -> None:
        """What `waiting` has returned is in the database."""
        del self._waiting[: self._n_taken]
        self._n_taken = 0
        if not self._waiting:
            for folder in self._replaced:
                remove_when_possible(self._store / folder)
            self._replaced = []

    def forget(self) -> None:
        """Let nothing wait any more: it is not going to be recorded."""
        self._waiting, self._steps, self._replaced, self._n_taken = [], {}, [], 0

    def _add(self, report: Report) -> None:
        self._close_batch()
        self._waiting.append(report)

    def _close_batch(self) -> None:
        """The steps that have come so far are one report."""
        if self._steps:
            steps, self._steps = self._steps, {}
            self._waiting.append(Report(self._claim, steps, self.progress))

    def _split_first(self, most_steps: int) -> None:
        """Make two reports of steps of the first one."""
        whole = self._waiting[0]
        assert whole.steps is not None, "only steps are many"
        first = {name: column[:most_steps] for name, column in whole.steps.items()}
        rest = {name: column[most_steps:] for name, column in whole.steps.items()}
        self._waiting[:1] = [Report(self._claim, first), Report(self._claim, rest, whole.progress)]

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

    def _begin(self, prepared: Prepared) -> None:
        """The trainer's decisions, and the cut of the step series where training resumes."""
        claim = self._claim
        log.info("job_prepared", job=claim.job_id, **prepared.execution)
        self.prepared, self.micro_batch = prepared, prepared.execution["micro_batch"]
        step = prepared.resumed_at_step or 0
        self.progress = {
            "step": step,
            "total_steps": prepared.total_steps,
            "epoch": self.progress.get("epoch", 0) if step else 0,
            "percent": _percent(step, prepared.total_steps),
        }
        self._add(
            recording.prepared_report(
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
            self._add(recording.rewinding(claim, step))
            resumed = {"code": "resumed", "message": f"attempt {claim.job.attempt} goes on from step {step}"}
            self._add(recording.event_report(claim, "warning", resumed))

    def _keep_micro_batch(self, micro_batch: int) -> None:
        """The smaller micro-batch, recorded so that a later attempt does not run out of memory again."""
        self.micro_batch = micro_batch
        self._add(recording.micro_batch_report(self._claim, micro_batch))

    def _add_checkpoint(self, message: CheckpointWritten) -> None:
        metrics = message.metrics
        log.info("checkpoint_written", job=self._claim.job_id, percent=metrics.percent, step=metrics.step)
        self._add(
            recording.checkpoint_report(
                self._claim,
                percent=metrics.percent,
                step=metrics.step,
                epoch=metrics.epoch,
                folder=self._relative(message.folder),
                manifest_sha256=message.manifest_sha256,
                files=[file.model_dump() for file in message.files],
                metrics=metrics.to_row() | {"tok_per_sec": message.tok_per_sec},
                progress=self.progress,
            )
        )
        if metrics.stopped_early:
            self.stopped_early_reason = checkpoint.stopped_early_reason(metrics)

    def _replace_snapshot(self, message: SnapshotWritten) -> None:
        """A snapshot in place of the previous one, whose files are removed once it is recorded."""
        folder = self._relative(message.folder)
        self._add(
            recording.snapshot_report(
                self._claim, step=message.step, folder=folder, manifest_sha256=message.manifest_sha256
            )
        )
        before, self.snapshot_folder = self.snapshot_folder, folder
        if before is not None:
            self._replaced.append(before)

    def drop_snapshot(self) -> None:
        """Remove the files of a job's snapshot once its end is recorded: it is not resumed any more."""
        if self.snapshot_folder is not None:
            remove_when_possible(self._store / self.snapshot_folder)

    def _relative(self, folder: str) -> str:
        return f"{job_folder(self._claim.job_id)}/{folder}"


def _percent(step: int, total: int) -> float:
    return round(100 * step / total, 2)
