"""When training ends before its last step: once the perplexity is low enough, or once validation loss has stopped
falling, which is counted from one evaluation to the next.

Knows no model.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from nanomoe.config import TrainConfig
from nanomoe.evaluation.metrics import largest_loss


@dataclass(frozen=True)
class ValidationHistory:
    """The evaluations of the held-out text so far."""

    best_val_loss: float | None = None
    """Lowest loss that counted as an improvement, nats per token; None before the first evaluation."""

    best_val_step: int | None = None
    """Optimizer steps before the evaluation that gave it."""

    without_improvement: int = 0
    """Consecutive evaluations since then."""

    def after(self, val_loss: float, step: int, *, min_delta: float) -> Self:
        """The history with one more evaluation. The first is an improvement; a later one if it is more than
        `min_delta` below the best, or below it at all where that is 0."""
        if self.best_val_loss is None or val_loss < self.best_val_loss - min_delta:
            return replace(self, best_val_loss=val_loss, best_val_step=step, without_improvement=0)
        return replace(self, without_improvement=self.without_improvement + 1)


class Losses(NamedTuple):
    """What an evaluation that may end training has found, nats per token; 0 where the rule does not look at it."""

    loss: float
    """Loss of the training text."""
    val_loss: float
    """Loss of the held-out text."""


class EndingRule(NamedTuple):
    """What ends training early."""

    most_loss: float | None
    """The loss of the training text at or below which it ends."""
    patience: int | None
    """Consecutive evaluations without an improvement of the held-out text's loss after which it ends."""
    min_delta: float
    """What counts as an improvement, see `ValidationHistory.after`."""

    @classmethod
    def of(cls, config: TrainConfig) -> Self | None:
        """That of a config; None where training goes to the end of its plan."""
        if config.stop_at_perplexity is None and config.early_stopping_patience is None:
            return None
        most_loss = None if config.stop_at_perplexity is None else largest_loss(config.stop_at_perplexity)
        return cls(most_loss, config.early_stopping_patience, config.early_stopping_min_delta)

    def judge(self, losses: Losses, step: int, history: ValidationHistory) -> tuple[bool, ValidationHistory]:
        """Whether training ends with an evaluation after `step` steps, and the history with it."""
        ends = self.most_loss is not None and losses.loss <= self.most_loss
        if self.patience is not None:
            history = history.after(losses.val_loss, step, min_delta=self.min_delta)
            ends = ends or history.without_improvement >= self.patience
        return ends, history
