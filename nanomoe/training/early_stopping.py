"""When validation loss has stopped falling: counted from one evaluation to the next.

Knows no model.
"""

from dataclasses import dataclass, replace
from typing import Self


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
