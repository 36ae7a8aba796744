"""An optimizer step operator by operator, its gradients by autograd: every model, every device, and the reference."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.dropout import Dropout
from nanomoe.model.gpt import GPT, token_losses
from nanomoe.model.moe import Routing
from nanomoe.training.optim import AdamW
from nanomoe.training.steps.step import Figures, Part, TrainingStep


class EagerStep(TrainingStep):
    """The step as its formulas say it."""

    def __init__(self, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype) -> None:
        """`activations`: type of activations and matrix products."""
        self._model = model
        self._windows = windows
        self._config = config
        self._activations = activations
        self._device = next(model.parameters()).device
        self._optimizer = AdamW(model, config)
        self._loss = torch.zeros((), device=self._device)
        """That of the step so far."""
        self.lr = config.lr
        self.is_skipped: Tensor | None = None
        """Where this is 1 and not 0 (float32, 0-dim), steps change nothing; None where all do."""

    def begin(self) -> None:
        self._optimizer.zero_grad()
        self._loss = torch.zeros((), device=self._device)

    def add(self, index: int, windows: Sequence[int], n_targets: int) -> Part:
        dropout = Dropout(
            self._config, seed=self._config.seed, step=index, windows=windows, device=self._device,
            dtype=self._activations,
        )  # fmt: skip
        share = self._windows.n_targets(list(windows)) / n_targets
        objective, part = self.objective(*self._windows.batch(list(windows)), dropout, n_targets, share)
        torch.autograd.backward(objective)
        self._loss += part.loss
        if self.is_skipped is None:
            return part
        is_done = (1 - self.is_skipped).long()
        counts, dropped = ({layer: n * is_done for layer, n in each.items()} for each in (part.counts, part.dropped))
        return Part(part.loss, counts, dropped)

    def update(self) -> Figures:
        grad_norm = self.gradient_norm()
        self.apply_gradients(grad_norm, self.lr, self.is_skipped)
        return Figures(self._loss, grad_norm)

    def objective(
        self, inputs_BT: Tensor, targets_BT: Tensor, dropout: Dropout, n_targets: int | Tensor, share: float | Tensor
    ) -> tuple[Tensor, Part]:
        """What a micro-batch's gradient is that of, 0-dim, and what else the micro-batch contributes.

        Args:
            inputs_BT: tokens, int64.
            targets_BT: their targets, int64.
            dropout: the micro-batch's own.
            n_targets: targets of the whole step.
            share: those of the micro-batch over those of the whole step.
        """
        self._model.train()
        with self._autocast():
            logits_BTV, routings = self._model(inputs_BT, dropout=dropout)
        loss = token_losses(logits_BTV, targets_BT).sum() / n_targets
        return balanced(loss, routings, self._config, share), part_of(loss, routings)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, 0-dim."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def apply_gradients(self, grad_norm: Tensor, lr: float | Tensor, skipped: Tensor | None = None) -> None:
        """Clip the gradient, whose norm is given, if the config says so, and change the weights; arguments as of
        `AdamW`."""
        if self._config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._model.parameters(), self._config.grad_clip, grad_norm)
        self._optimizer.lr = lr
        self._optimizer.step(skipped)

    def tensors(self) -> dict[str, Tensor]:
        return self._optimizer.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._optimizer.load(tensors)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._activations == torch.float32:
            return nullcontext()
        # Every weight is used once a step: a cache of cast weights would only hold memory.
        return torch.autocast(self._device.type, dtype=self._activations, cache_enabled=False)


class Auxiliary(Protocol):
    """What a mixture adds to the loss, see `Routing`."""

    @property
    def aux_loss(self) -> Tensor:
        """Load balance, unweighted."""

    @property
    def z_loss(self) -> Tensor:
        """Size of the router's logits, unweighted."""


def balanced(loss: Tensor, routings: Mapping[int, Auxiliary], config: JobConfig, share: float | Tensor) -> Tensor:
    """A micro-batch's loss and the auxiliary losses of its mixtures, these weighted by its share of the step; of one
    model, 0-dim, or of several."""
    for routing in routings.values():
        balance = config.router_aux_loss_coef * routing.aux_loss + config.router_z_loss_coef * routing.z_loss
        loss = loss + balance * share
    return loss


def part_of(loss: Tensor, routings: Mapping[int, Routing]) -> Part:
    """What a micro-batch contributes beside its gradient."""
    return Part(
        loss.detach(),
        {layer: routing.counts_E for layer, routing in routings.items()},
        {layer: routing.dropped for layer, routing in routings.items()},
    )
