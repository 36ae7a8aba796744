"""What a captured step consists of: work on tensors that lie on the device, of which the host reads nothing.

The plain operators are those of `nanomoe.training.steps.eager`, in its order.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.dropout import Counters, Dropout
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.step import Part


class Operators(Protocol):
    """The arithmetic of a step whose numbers are all on the device."""

    def objective(self, windows_B: Tensor, keys_B: Tensor, n_targets: Tensor, share: Tensor) -> tuple[Tensor, Part]:
        """What a micro-batch's gradient is that of, 0-dim, and what else the micro-batch contributes.

        Args:
            windows_B: numbers of its windows, int64.
            keys_B: their `window_keys`, int64.
            n_targets: targets of the whole step, float32, 0-dim.
            share: those of the micro-batch over those of the whole step, float32, 0-dim.
        """

    def update(self, loss: Tensor, lr: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Clip the parameters' gradients if the config says so, and change the weights. All float32, 0-dim.

        Args:
            loss: that of the step.
            lr: its learning rate.
            norm: is set to the norm of the whole gradient before clipping.
            skipped: is set to 1 where loss or norm is not finite; where it is 1, nothing else changes.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, see `TrainingStep`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it over, see `TrainingStep`."""


class PlainOperators:
    """Operators of torch."""

    def __init__(
        self, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype, counters: Counters
    ) -> None:
        """`counters` keeps its results for as long as anything captured reads them."""
        self._step = EagerStep(model, windows, config, activations)
        self._windows = windows
        self._config = config
        self._activations = activations
        self._counters = counters

    def objective(self, windows_B: Tensor, keys_B: Tensor, n_targets: Tensor, share: Tensor) -> tuple[Tensor, Part]:
        dropout = Dropout.of_window_keys(self._config, keys_B, dtype=self._activations, counters=self._counters)
        return self._step.objective(*self._windows.gather(windows_B), dropout, n_targets, share)

    def update(self, loss: Tensor, lr: Tensor, norm: Tensor, skipped: Tensor) -> None:
        grad_norm = self._step.gradient_norm()
        is_finite = torch.stack([loss, grad_norm]).isfinite().all()
        skipped.copy_(torch.maximum(skipped, (~is_finite).float()))
        self._step.apply_gradients(grad_norm, lr, skipped)
        norm.copy_(grad_norm)

    def tensors(self) -> dict[str, Tensor]:
        return self._step.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._step.load(tensors)
