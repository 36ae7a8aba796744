"""Captured steps that stay between the jobs of a process: the next job of the same shape captures nothing.

What is kept is a model, the windows of a text and the step that was captured of them. The job that takes them over
overwrites the weights, the text, the optimizer's state and the seed, so its bytes are those of a step captured anew.
"""

from typing import Any, NamedTuple

from nanomoe.config import SampleConfig, TrainConfig
from nanomoe.data import Windows
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.captured import CapturedStep

MOST_KEPT = 2
"""Shapes whose steps are kept. How much memory they may hold, the process that keeps them decides."""

_CAPTURED_NUMBERS = {
    "weight_decay", "betas", "eps", "grad_clip", "batch_size", "gradient_accumulation_steps", "precision",
    "val_fraction", "deterministic",
}  # fmt: skip
"""What training is told that a graph has as it was at the capture, or that decides a shape."""

NOT_CAPTURED = (TrainConfig.model_fields.keys() | SampleConfig.model_fields.keys()) - _CAPTURED_NUMBERS
"""Fields of a job's config in which jobs of one shape may differ."""


class Kept(NamedTuple):
    """What a job leaves to the next."""

    model: GPT
    windows: Windows
    step: CapturedStep


class KeptSteps:
    """The steps of the most recent shapes, each for one job at a time."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, shape: str) -> Kept | None:
        """What was kept for this shape, which is then the caller's."""
        return self._kept.pop(shape, None)

    def put(self, shape: str, kept: Kept) -> None:
        """Keep a step for the next job of its shape, in place of the shape that was not used for the longest time."""
        self._kept[shape] = kept
        while len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]

    def forget(self) -> None:
        """Keep nothing."""
        self._kept.clear()


def shape_of(config: TrainConfig, **others: Any) -> str:
    """What two jobs must have in common for the second to use the first one's step: their configs but for what is
    `NOT_CAPTURED`, and whatever else is named."""
    return repr((sorted(config.model_dump(exclude=set(NOT_CAPTURED)).items()), sorted(others.items())))
