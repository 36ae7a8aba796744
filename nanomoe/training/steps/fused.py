"""An optimizer step on a CPU written out: products by torch into buffers that stay, everything between them in compiled
loops, no autograd. It computes what `nanomoe.training.steps.eager` computes, with the same dropout masks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.dropout import Site, n_planes
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.loops.keys import plane_keys
from nanomoe.training.steps.micro_batch import MicroBatch
from nanomoe.training.steps.parameters import FlatParameters
from nanomoe.training.steps.step import Figures, Part, TrainingStep
from nanomoe.training.steps.team import Team


class FusedStep(TrainingStep):
    """The step written out."""

    def __init__(self, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype) -> None:
        """`activations`: type of activations and matrix products. The model's parameters become views of a buffer that
        this step holds. The threads that torch may take now share each micro-batch."""
        self._windows = windows
        self._config = config
        self._activations = activations
        self._team = Team(torch.get_num_threads())
        self._parameters = FlatParameters(model, config, activations, self._team)
        self._micro_batches: dict[int, MicroBatch] = {}
        """By the number of their windows: the last of an epoch may have fewer."""
        self._n_parts = 0
        self._n_steps = 0
        self._loss = torch.zeros(())
        """That of the step so far."""
        self.lr = config.lr

    def begin(self) -> None:
        self._n_parts = 0
        self._loss = torch.zeros(())
        self._parameters.forget_gradients()

    def add(self, index: int, windows: Sequence[int], n_targets: int) -> Part:
        config, B = self._config, len(windows)
        if B not in self._micro_batches:
            self._micro_batches[B] = MicroBatch(
                B, self._windows.length, self._parameters, config, self._activations, self._team
            )
        if self._n_parts > 0:
            self._parameters.gather_gradients(is_first=self._n_parts == 1)
        inputs_BT, targets_BT = self._windows.batch(list(windows))
        keys = np.empty((config.n_layer + 1, len(Site), B, n_planes(config), 2), np.uint32)
        plane_keys(np.uint64(config.seed), np.uint64(index), np.array(windows), keys)
        # In bfloat16 a gradient is gathered in float32, not added to where it comes out.
        adds = self._n_parts > 0 and self._activations == torch.float32
        micro_batch = self._micro_batches[B]
        loss = micro_batch.gradient(inputs_BT.numpy(), targets_BT.flatten().numpy(), keys, 1 / n_targets, adds=adds)
        self._n_parts += 1
        mixtures = micro_batch.mixtures
        part_loss = torch.tensor(loss, dtype=torch.float32)
        self._loss += part_loss
        return Part(
            part_loss,
            {layer: mixture.counts for layer, mixture in mixtures.items()},
            {layer: mixture.dropped for layer, mixture in mixtures.items()},
        )

    def update(self) -> Figures:
        is_gathered = self._n_parts > 1
        if is_gathered:
            self._parameters.gather_gradients(is_first=False)
        self._n_steps += 1
        norm = self._parameters.update(self.lr, self._n_steps, is_gathered=is_gathered)
        return Figures(self._loss, torch.tensor(norm, dtype=torch.float32))

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter since `begin`, products in float32; views of what the next step overwrites."""
        assert self._activations == torch.float32, "in bfloat16 a gradient is whole only within the update"
        return self._parameters.gradients

    def tensors(self) -> dict[str, Tensor]:
        steps = {f"step.{name}": torch.tensor(float(self._n_steps)) for name in self._parameters.weights}
        return steps | self._parameters.moments()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._n_steps = int(next(tensors[f"step.{name}"] for name in self._parameters.weights))
        for name, moment in self._parameters.moments().items():
            moment.copy_(tensors[name])
