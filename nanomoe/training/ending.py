"""The evaluations that may end a run early: made after their step, or launched there and read some steps later.

Where steps are captured, none of them waits for an evaluation: the device decides, and steps after the one that ended
training change nothing. Whoever trains learns of it when the evaluations are read, and takes those steps back.

Knows no optimizer and no checkpoint.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanomoe.evaluation.evaluated_text import RaiseIfStopped
from nanomoe.training.early_stopping import EndingRule, Losses, ValidationHistory
from nanomoe.training.steps.ending import CapturedEnding


class Judged(NamedTuple):
    """What evaluations say that have been read."""

    history: ValidationHistory
    """With all of them but one whose step's evaluation is due."""
    ended_after: int | None
    """The step whose evaluation ends training; None where none does."""


class Ending:
    """Whether a run ends early."""

    def __init__(
        self, rule: EndingRule, evaluate: Callable[[RaiseIfStopped], Losses], captured: CapturedEnding | None
    ) -> None:
        """`evaluate`: what evaluates the weights as they are. `captured`: what does so, and decides, on the device."""
        self._rule = rule
        self._evaluate = evaluate
        self._captured = captured
        self._launched: list[tuple[int, Tensor]] = []
        """(step, what is found) of evaluations that were not read yet."""
        self._read: dict[int, Losses] = {}
        """Losses after a step whose evaluation is due."""

    @property
    def may_have_come(self) -> bool:
        """Whether steps are known to change nothing any more: `read`, or their figures, will say why."""
        return self._captured is not None and self._captured.may_have_ended

    def launch(self, step: int, history: ValidationHistory) -> bool:
        """Begin the evaluation after a step, and wait for nothing; False where evaluations are not launched.

        `history`: what is known where all evaluations have been read.

        Raises:
            CaptureFailed: it cannot be launched, nor can any other from now on.
        """
        captured, self._captured = self._captured, None
        if captured is None:
            return False
        if not self._launched:
            captured.follow(history)
        self._launched.append((step, captured.launch()))
        self._captured = captured
        return True

    def read(self, history: ValidationHistory, due: int | None) -> Judged:
        """Wait for what was launched, and judge it. `due`: a step whose evaluation `has_come` will judge."""
        launched, self._launched = self._launched, []
        rows = torch.stack([found for _, found in launched]).tolist() if launched else []
        for (step, _), (loss, val_loss, has_ended) in zip(launched, rows, strict=True):
            losses = Losses(loss, val_loss)
            ends, after = self._rule.judge(losses, step, history)
            assert ends == bool(has_ended), "the device decides as the host does"
            if ends or step == due:
                self._read = {step: losses}
                return Judged(history, step if ends else None)
            history = after
        return Judged(history, None)

    def has_come(
        self, step: int, history: ValidationHistory, raise_if_stopped: RaiseIfStopped
    ) -> tuple[bool, ValidationHistory]:
        """Whether the evaluation after this step ends training, and the history with it. It is made now, unless it was
        launched and has been read."""
        losses = self._read.pop(step, None) or self._evaluate(raise_if_stopped)
        return self._rule.judge(losses, step, history)
