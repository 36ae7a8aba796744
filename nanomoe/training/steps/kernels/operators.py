"""The operators of a captured step, with kernels between its matrix products."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.dropout import Counters
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.eager import balanced, part_of
from nanomoe.training.steps.kernels.network import Network
from nanomoe.training.steps.kernels.update import FlatAdamW
from nanomoe.training.steps.kernels.window_tokens import gather
from nanomoe.training.steps.step import Part


class KernelOperators:
    """See `nanomoe.training.steps.operators.Operators`; `PlainOperators` are the reference."""

    def __init__(
        self, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype, counters: Counters
    ) -> None:
        """The model's parameters and their gradients become views of buffers that this object holds."""
        self._model = model
        self._windows = windows
        self._config = config
        self._optimizer = FlatAdamW(model, config)
        self._network = Network(model, config, activations, counters)

    def objective(self, windows_B: Tensor, keys_B: Tensor, n_targets: Tensor, share: Tensor) -> tuple[Tensor, Part]:
        self._model.train()
        loss, routings = self._network.loss(*gather(self._windows, windows_B), keys_B, n_targets)
        return balanced(loss, routings, self._config, share), part_of(loss, routings)

    def update(self, loss: Tensor, lr: Tensor, norm: Tensor, skipped: Tensor) -> None:
        self._optimizer.update(loss, lr, norm, skipped)

    def tensors(self) -> dict[str, Tensor]:
        return self._optimizer.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._optimizer.load(tensors)
