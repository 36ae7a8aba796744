"""The training loop: a generator that yields what happened, and goes on when its caller has dealt with it.

Knows no database, no HTTP and no folder: a checkpoint is yielded as the bytes of its files. The weights do not change
while the caller holds what was yielded.
"""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from nanomoe.errors import NanomoeError
from nanomoe.evaluation.evaluated_text import RaiseIfStopped, go_on
from nanomoe.plan import OutOfMemory
from nanomoe.training.beside import Beside, FirstCheckpoint, Recording, SharedThread, Waits
from nanomoe.training.run import Recorded, Run, Snapshot, Warned
from nanomoe.training.steps.step import MOST_UNREAD

__all__ = [
    "Control",
    "Happened",
    "LossNotFinite",
    "OutOfMemory",
    "Recorded",
    "Run",
    "Snapshot",
    "Steps",
    "StopAfter",
    "StopReason",
    "Stopped",
    "Undisturbed",
    "Warned",
    "train",
    "train_in_turns",
]

REPORT_SECONDS = 0.25
"""Step figures are gathered this long before they are yielded: reading them waits for the device."""

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


class StopAfter(Undisturbed):
    """Ends a run after so many more steps, without a snapshot."""

    def __init__(self, run: Run, steps: int) -> None:
        self._run = run
        self._last = run.progress.step + steps

    def stop(self) -> StopReason | None:
        return "cancel" if self._run.progress.step >= self._last else None


def train(run: Run, control: Control | None = None) -> Iterator[Happened]:
    """Train to the end of the plan, from wherever `run` stands.

    Raises:
        LossNotFinite: at the step where it was seen.
        OutOfMemory: a step does not fit, however it is cut.
    """
    control = control or Undisturbed()
    with closing(_train(run, control, FirstCheckpoint(run, has_thread=True), Beside(run.device))) as turns:
        for happened in turns:
            if happened is not None and not isinstance(happened, Waits):
                yield happened


def train_in_turns(
    run: Run, control: Control, beside: SharedThread | None = None
) -> Generator[Happened | Waits | None]:
    """What `train` does, by whoever has other runs to advance too: yields None as well, after each step and before
    anything that comes of it is looked at.

    What `train` makes beside the steps is made in the thread `beside`, which other runs share, and percent 100 too;
    `WAITS` is yielded as long as this run has to wait for the thread. Without one they are made by whoever advances the
    generator, the first checkpoint right after the first step: on a CPU, threads would only take the cores from the
    other runs. Events are those of `train`, and so is every bit of them.

    Raises:
        As `train`.
    """
    first = FirstCheckpoint(run, has_thread=beside is not None, shared=beside)
    return _train(run, control, first, Beside(run.device, shared=beside))


def _train(run: Run, control: Control, first: FirstCheckpoint, later: Beside) -> Generator[Happened | Waits | None]:
    try:
        yield from _steps(run, control, first, later)
    except (LossNotFinite, OutOfMemory):
        with suppress(_StopAsked):
            yield from first.collect(_raiser(control))
            yield from later.collect(_raiser(control))
        raise
    finally:
        first.abandon()
        later.abandon()


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


def _steps(run: Run, control: Control, first: FirstCheckpoint, later: Beside) -> Iterator[Happened | Waits | None]:
    progress, quarters = run.progress, run.plan.quarters
    report = _Report(run)

    def catch_up() -> Iterator[Happened | Waits]:
        """All that waits for nothing: the first checkpoint of a long text would hold up a stop until it is too late."""
        run.read_evaluations()
        if first.ready:
            yield from first.collect(_raiser(control))
        if later.ready:
            yield from later.collect(_raiser(control))
        yield from report.flush()

    def stop(reason: StopReason) -> Iterator[Happened | Waits]:
        yield from catch_up()
        if reason != "cancel" and progress.step > 0:
            yield from later.collect(go_on)  # whoever resumes does not make what is under way
            yield run.snapshot(first.untrained)
        yield Stopped(reason, progress.step)

    while progress.step < run.plan.total_steps or progress.evaluation_is_due:
        reason = control.stop()
        if reason is not None:
            yield from stop(reason)
            return
        if not progress.evaluation_is_due:
            report.add(*run.train_step())
            yield None
            waits_for_it = run.may_end and not run.launch_evaluation()
            progress.evaluation_is_due = progress.step in quarters or waits_for_it
            yield from run.warnings
            run.warnings.clear()
            if report.due() or run.may_have_ended:
                yield from catch_up()
                first.begin()
            if first.waits_for_its_turn:
                try:
                    yield from first.collect(_raiser(control))
                except _StopAsked as asked:
                    yield from stop(asked.reason)
                    return
                report.restart_clock()
        if progress.evaluation_is_due:
            run.read_evaluations()
            validation = progress.validation
            try:
                last = yield from _evaluate(run, _raiser(control), first, later, report)
            except _StopAsked as asked:
                progress.validation = validation  # whoever resumes evaluates anew
                yield from stop(asked.reason)
                return
            if last is not None:
                if last == 100:
                    return
                report.restart_clock()
        if control.snapshot_due():
            yield from catch_up()
            if later.may_begin:
                yield from later.collect(go_on)
                later.begin(run.frozen_snapshot(first.untrained))
            else:
                yield run.snapshot(first.untrained)


def _evaluate(
    run: Run, raise_if_stopped: RaiseIfStopped, first: FirstCheckpoint, later: Beside, report: "_Report"
) -> Generator[Happened | Waits, None, int | None]:
    """Make the evaluations that are due after this step, or begin to; the percent of the checkpoint, if it has one.

    Raises:
        _StopAsked: before anything is recorded.
    """
    step, quarters = run.progress.step, run.plan.quarters
    ends = run.may_end and run.has_reached_its_end(raise_if_stopped)
    if not ends and step not in quarters:
        run.progress.evaluation_is_due = False
        return None
    yield from first.collect(raise_if_stopped)
    yield from later.collect(raise_if_stopped)
    yield from report.flush()
    percent = 100 if ends else quarters[step]
    recording = Recording(
        run,
        percent,
        stopped_early=ends and step < run.plan.total_steps,
        tok_per_sec=report.speed_since_checkpoint(),
    )
    if not later.may_begin or (percent == 100 and not later.is_shared):
        happened = recording(raise_if_stopped)
        run.progress.evaluation_is_due = False
        yield from happened
        return percent
    of = run.copy()
    if percent == 100:
        run.leave_program()
        later.begin(replace(recording, run=of))
        try:
            yield from later.collect(raise_if_stopped)
        except _StopAsked:
            later.abandon()
            raise
    else:
        run.count_anew()

        def take_over() -> None:
            run.progress.choices = of.progress.choices

        later.begin(replace(recording, run=of), take_over)
    run.progress.evaluation_is_due = False
    return percent


class _Report:
    """Gathers step figures on the device, and reads them together."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._figures: list[tuple[Tensor, Tensor]] = []
        self._lr: list[float] = []
        self._targets: list[int] = []
        self._read = run.progress.step
        """Steps before the gathered ones."""
        self._quarter_targets = 0
        self._quarter_seconds = 0.0
        self._since = time.monotonic()

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self._figures.append((loss, grad_norm))
        self._lr.append(self._run.step.lr)
        step = self._run.order.step(self._run.progress.step - 1)
        self._targets.append(self._run.windows.n_targets(step.windows))

    def due(self) -> bool:
        """The first step is news at once; later ones are read together."""
        is_full = len(self._figures) >= MOST_UNREAD
        return self._run.progress.step == 1 or is_full or time.monotonic() - self._since >= REPORT_SECONDS

    def flush(self) -> Iterator[Steps]:
        """Yield the gathered figures, if there are any, but those of steps that were taken back.

        Raises:
            LossNotFinite: at the first step that is not; the steps before it are yielded first.
        """
        if not self._figures:
            return
        last, first = self._run.progress.step, self._read + 1
        done = slice(last - self._read)
        # One operator and one wait, however many they are.
        figures = torch.stack([figure for pair in self._figures[done] for figure in pair])
        losses, norms = figures.view(-1, 2).float().T.tolist()
        seconds, n_targets = time.monotonic() - self._since, sum(self._targets[done])
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
                tok_per_sec=n_targets / max(seconds, 1e-9),
            )
        if good < len(losses):
            raise LossNotFinite(
                f"at step {first + good} the loss is {losses[good]} and the gradient norm {norms[good]}; "
                "a lower lr, warmup_steps or grad_clip usually helps"
            )
        self._quarter_targets += n_targets
        self._quarter_seconds += seconds
        self._figures, self._lr, self._targets, self._read = [], [], [], last
        self._since = time.monotonic()

    def speed_since_checkpoint(self) -> float | None:
        if not self._quarter_targets:
            return None
        return self._quarter_targets / max(self._quarter_seconds, 1e-9)

    def restart_clock(self) -> None:
        """Leave out what was spent on a checkpoint."""
        self._quarter_targets, self._quarter_seconds = 0, 0.0
        self._since = time.monotonic()
