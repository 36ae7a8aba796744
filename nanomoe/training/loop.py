"""The training loop: a generator that yields what happened, and goes on when its caller has dealt with it.

Knows no database, no HTTP and no folder: a checkpoint is yielded as the bytes of its files. The weights do not change
while the caller holds what was yielded.
"""

import math
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from nanomoe.errors import NanomoeError
from nanomoe.evaluation.evaluated_text import RaiseIfStopped
from nanomoe.plan import OutOfMemory
from nanomoe.training.run import Recorded, Run, Snapshot, Warned

__all__ = [
    "Control",
    "Happened",
    "LossNotFinite",
    "OutOfMemory",
    "Recorded",
    "Run",
    "Snapshot",
    "Steps",
    "StopReason",
    "Stopped",
    "Undisturbed",
    "Warned",
    "train",
]

REPORT_SECONDS = 0.25
"""Step figures are gathered this long before they are yielded: reading them waits for the device."""

STOP_SECONDS = 0.05
"""Time between two looks for a stop while the first checkpoint is waited for."""

StopReason = Literal["cancel", "pause", "drain"]


class LossNotFinite(NanomoeError, ArithmeticError):
    """The loss or the gradient is NaN or infinite; nothing after the last good step was yielded."""

    code = "loss_not_finite"


@dataclass(frozen=True)
class Steps:
    """The figures of consecutive optimizer steps, column by column."""

    step: list[int]
    """From 1."""
    train_loss: list[float]
    """Cross-entropy of the step's targets with dropout on, nats per token, no auxiliary loss in it."""
    lr: list[float]
    grad_norm: list[float]
    """Norm of the whole gradient, before clipping."""
    epoch: int
    """Epoch of the last of these steps."""
    tok_per_sec: float
    """Targets trained on per second."""


@dataclass(frozen=True)
class Stopped:
    """The caller asked for a stop; the snapshot before it, if there was one to take, is where it would go on."""

    reason: StopReason
    step: int


Happened = Steps | Recorded | Snapshot | Warned | Stopped


class Control(Protocol):
    """What the caller wants, asked between steps and between the batches of an evaluation, always in the thread that
    runs the loop."""

    def stop(self) -> StopReason | None:
        """Why training should stop now, or None."""

    def snapshot_due(self) -> bool:
        """Whether a rolling snapshot should be taken now."""


class Undisturbed:
    """Never stops, takes no rolling snapshot."""

    def stop(self) -> StopReason | None:
        return None

    def snapshot_due(self) -> bool:
        return False


def train(run: Run, control: Control | None = None) -> Iterator[Happened]:
    """Train to the end of the plan, from wherever `run` stands.

    Raises:
        LossNotFinite: at the step where it was seen.
        OutOfMemory: a step does not fit, however it is cut.
    """
    control = control or Undisturbed()
    first = _FirstCheckpoint(run)
    try:
        yield from _steps(run, control, first)
    except (LossNotFinite, OutOfMemory):
        with suppress(_StopAsked):
            yield from first.collect(_raiser(control))
        raise
    finally:
        first.abandon()


class _StopAsked(Exception):
    """A stop was asked for in the middle of an evaluation, which ends without a result."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason: StopReason = reason


def _raiser(control: Control) -> RaiseIfStopped:
    """Raises `_StopAsked` when the caller wants a stop."""

    def raise_if_stopped() -> None:
        reason = control.stop()
        if reason is not None:
            raise _StopAsked(reason)

    return raise_if_stopped


def _steps(run: Run, control: Control, first: "_FirstCheckpoint") -> Iterator[Happened]:
    progress, quarters = run.progress, run.plan.quarters
    report = _Report(run)

    def catch_up() -> Iterator[Happened]:
        """All that waits for nothing: the first checkpoint of a long text would hold up a stop until it is too late."""
        if first.ready:
            yield from first.collect(_raiser(control))
        yield from report.flush()

    def stop(reason: StopReason) -> Iterator[Happened]:
        yield from catch_up()
        if reason != "cancel" and progress.step > 0:
            yield run.snapshot(first.untrained)
        yield Stopped(reason, progress.step)

    while progress.step < run.plan.total_steps or progress.evaluation_is_due:
        reason = control.stop()
        if reason is not None:
            yield from stop(reason)
            return
        if not progress.evaluation_is_due:
            report.add(*run.train_step())
            yield from run.warnings
            run.warnings.clear()
            if report.due():
                yield from catch_up()
                first.begin()
            progress.evaluation_is_due = progress.step in quarters or run.may_end
        if progress.evaluation_is_due:
            validation = progress.validation
            try:
                last = yield from _evaluate(run, _raiser(control), first, report)
            except _StopAsked as asked:
                progress.validation = validation  # whoever resumes evaluates anew
                yield from stop(asked.reason)
                return
            if last is not None:
                if last.percent == 100:
                    return
                report.restart_clock()
        if control.snapshot_due():
            yield from catch_up()
            yield run.snapshot(first.untrained)


def _evaluate(
    run: Run, raise_if_stopped: RaiseIfStopped, first: "_FirstCheckpoint", report: "_Report"
) -> Generator[Happened, None, Recorded | None]:
    """Make the evaluations that are due after this step; the checkpoint, if one was recorded.

    Raises:
        _StopAsked: before anything is recorded.
    """
    step, quarters = run.progress.step, run.plan.quarters
    ends = run.may_end and run.has_reached_its_end(raise_if_stopped)
    if not ends and step not in quarters:
        run.progress.evaluation_is_due = False
        return None
    yield from first.collect(raise_if_stopped)
    yield from report.flush()
    recorded, warnings = run.record(
        100 if ends else quarters[step],
        stopped_early=ends and step < run.plan.total_steps,
        tok_per_sec=report.speed_since_checkpoint(),
        raise_if_stopped=raise_if_stopped,
    )
    run.progress.evaluation_is_due = False
    yield recorded
    yield from warnings
    return recorded


class _FirstCheckpoint:
    """Percent 0, evaluated on a copy of the model in a thread: it does not stand in the way of the first steps."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.untrained = run.untrained_copy()
        """The copy, until the checkpoint is yielded."""
        self._future: Future[tuple[Recorded, list[Warned]]] | None = None
        self._abandoned = threading.Event()

    def begin(self) -> None:
        """Start the thread, unless that was done: after the first step, so that this one has the machine for itself."""
        if self.untrained is not None and self._future is None:
            # One thread, whatever the steps have, leaves them the other cores (assumed to be better; measured only on a
            # machine with other work). The reference run's figures are the same bytes as with two (measured).
            pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
            self._future = pool.submit(
                self.untrained.record,
                0,
                stopped_early=False,
                tok_per_sec=None,
                raise_if_stopped=self._raise_if_abandoned,
            )
            pool.shutdown(wait=False)

    @property
    def ready(self) -> bool:
        """Whether `collect` would not wait."""
        return self._future is not None and self._future.done()

    def abandon(self) -> None:
        """Let the thread end before its next batch: nobody will collect the checkpoint."""
        self._abandoned.set()

    def _raise_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise CancelledError

    def collect(self, raise_if_stopped: RaiseIfStopped) -> Iterator[Recorded | Warned]:
        """Yield the checkpoint, once; its choices are what the next one's churn is measured against."""
        self.begin()
        if self.untrained is not None and self._future is not None:
            while wait_for([self._future], STOP_SECONDS).not_done:
                raise_if_stopped()
            recorded, warnings = self._future.result()
            self._run.progress.choices = self.untrained.progress.choices
            self.untrained = self._future = None
            yield recorded
            yield from warnings


class _Report:
    """Gathers step figures on the device, and reads them together."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._figures: list[tuple[Tensor, Tensor]] = []
        self._lr: list[float] = []
        self._targets = 0
        self._quarter_targets = 0
        self._quarter_seconds = 0.0
        self._since = time.monotonic()

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self._figures.append((loss, grad_norm))
        self._lr.append(self._run.step.lr)
        step = self._run.order.step(self._run.progress.step - 1)
        self._targets += self._run.windows.n_targets(step.windows)

    def due(self) -> bool:
        """The first step is news at once; later ones are read together."""
        return self._run.progress.step == 1 or time.monotonic() - self._since >= REPORT_SECONDS

    def flush(self) -> Iterator[Steps]:
        """Yield the gathered figures, if there are any.

        Raises:
            LossNotFinite: at the first step that is not; the steps before it are yielded first.
        """
        if not self._figures:
            return
        # One operator and one wait, however many they are.
        figures = torch.stack([figure for pair in self._figures for figure in pair])
        losses, norms = figures.view(-1, 2).float().T.tolist()
        seconds = time.monotonic() - self._since
        last = self._run.progress.step
        first = last - len(losses) + 1
        good = next(
            (i for i, pair in enumerate(zip(losses, norms, strict=True)) if not all(map(math.isfinite, pair))),
            len(losses),
        )
        if good:
            self._run.progress.train_loss = losses[good - 1]
            yield Steps(
                step=list(range(first, first + good)),
                train_loss=losses[:good],
                lr=self._lr[:good],
                grad_norm=norms[:good],
                epoch=self._run.plan.epoch_of(first + good - 1),
                tok_per_sec=self._targets / max(seconds, 1e-9),
            )
        if good < len(losses):
            raise LossNotFinite(
                f"at step {first + good} the loss is {losses[good]} and the gradient norm {norms[good]}; "
                "a lower lr, warmup_steps or grad_clip usually helps"
            )
        self._quarter_targets += self._targets
        self._quarter_seconds += seconds
        self._figures, self._lr, self._targets = [], [], 0
        self._since = time.monotonic()

    def speed_since_checkpoint(self) -> float | None:
        if not self._quarter_targets:
            return None
        return self._quarter_targets / max(self._quarter_seconds, 1e-9)

    def restart_clock(self) -> None:
        """Leave out what was spent on a checkpoint."""
        self._quarter_targets, self._quarter_seconds = 0, 0.0
        self._since = time.monotonic()
