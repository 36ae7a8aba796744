"""How an evaluation passes the windows of a text through the model, and what it learns from that.

`PlainReader` goes operator by operator, with every model and on every device. Others read faster where they can, and
tests compare them with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from nanomoe.data import IGNORE, Windows
from nanomoe.evaluation.evaluated_text import RaiseIfStopped, go_on
from nanomoe.evaluation.moe_metrics import LayerRouting
from nanomoe.model.gpt import GPT, token_losses

BATCH_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Activations of a block that are held at once, by the kind of device: windows are evaluated together as long as these
fit. On a CPU a larger batch is no faster, 43,000 tokens a second and core at 768 tokens of 128 channels, 41,000 at
2,048 and at 8,192 (measured), and a stop is noticed between two batches. The bound on a GPU is assumed."""

LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Logits that are held at once, by the kind of device. On a CPU larger blocks are slower: of tokens with 8,192 logits
26,000 a second and core in blocks of 1 and of 4 MB, 19,000 in 16 MB, 15,000 in 64 MB (measured). The bound on a GPU is
assumed."""


@dataclass(frozen=True)
class Reading:
    """The model's losses, predictions and routing at every target of some windows, in the text's order."""

    windows: list[int]
    """Ascending."""
    n_targets: list[int]
    """Number of targets in each of the windows."""
    losses: list[float]
    """Cross-entropy of each target, nats."""
    total: float
    """Their sum, added up in the order of the reader's batches."""
    predicted: list[int]
    """The likeliest token in place of each target, of equals the one with the lowest id."""
    routing: dict[int, LayerRouting]
    """{layer: routing of the tokens that have a target}."""

    def places(self) -> dict[int, slice]:
        """{window: where its targets lie in the lists}."""
        bounds = pairwise(accumulate(self.n_targets, initial=0))
        return {window: slice(*each) for window, each in zip(self.windows, bounds, strict=True)}


class Reader(ABC):
    """A way to pass windows through a model at its present weights, dropout, noise and capacity off."""

    @abstractmethod
    def read(self, windows: Windows, chosen: Sequence[int], raise_if_stopped: RaiseIfStopped = go_on) -> Reading:
        """Read the windows `chosen`, ascending. `raise_if_stopped` is called before every batch of them."""

    @abstractmethod
    def losses_without(
        self, windows: Windows, chosen: Sequence[int], raise_if_stopped: RaiseIfStopped = go_on
    ) -> dict[int, list[float]]:
        """{MoE layer: loss of the windows `chosen` with the output of expert e removed, for each e}, nats per token."""


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode (no capacity, no noise), and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class PlainReader(Reader):
    """The model as it stands, in evaluation mode."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    @torch.no_grad()
    def read(self, windows: Windows, chosen: Sequence[int], raise_if_stopped: RaiseIfStopped = go_on) -> Reading:
        per_batch = self.windows_per_batch(windows)
        losses: list[float] = []
        total = torch.zeros((), dtype=torch.float64, device=windows.device)
        predicted: list[int] = []
        parts: dict[int, list[LayerRouting]] = {layer: [] for layer in self.model.moe_layers}
        for first in range(0, len(chosen), per_batch):
            raise_if_stopped()
            inputs_BT, targets_BT = windows.batch(list(chosen[first : first + per_batch]))
            with evaluating(self.model):
                hidden_BTC, routings = self.model.hidden(inputs_BT)
            losses_BT, predicted_BT = self._losses_and_predictions(hidden_BTC, targets_BT)
            total += losses_BT.double().sum()
            real_BT = targets_BT != IGNORE
            losses += losses_BT[real_BT].tolist()
            predicted += predicted_BT[real_BT].tolist()
            for layer, routing in routings.items():
                parts[layer].append(LayerRouting.of(routing, real_BT.flatten()))
        return Reading(
            windows=list(chosen),
            n_targets=[windows.n_targets([window]) for window in chosen],
            losses=losses,
            total=total.item(),
            predicted=predicted,
            routing={layer: LayerRouting.join(rows) for layer, rows in parts.items()},
        )

    @torch.no_grad()
    def losses_without(
        self, windows: Windows, chosen: Sequence[int], raise_if_stopped: RaiseIfStopped = go_on
    ) -> dict[int, list[float]]:
        inputs_BT, targets_BT = windows.batch(list(chosen))
        n_targets = windows.n_targets(list(chosen))

        def loss(layer: int, expert: int) -> float:
            raise_if_stopped()
            with evaluating(self.model):
                hidden_BTC, _ = self.model.hidden(inputs_BT, without=(layer, expert))
            return self._losses(hidden_BTC, targets_BT).double().sum().item() / n_targets

        n_experts = self.model.config.n_experts
        return {layer: [loss(layer, expert) for expert in range(n_experts)] for layer in self.model.moe_layers}

    def sum_of_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The sum of a batch's losses, float64, 0-dim: what `read` adds to its `total`. Nothing is read back."""
        with torch.no_grad(), evaluating(self.model):
            hidden_BTC, _ = self.model.hidden(inputs_BT)
            return self._losses(hidden_BTC, targets_BT).double().sum()

    def windows_per_batch(self, windows: Windows) -> int:
        """The number of windows whose activations of one block `BATCH_BYTES` hold; at least one."""
        config = self.model.config
        hidden = max(4 * config.n_embd, (config.k + config.n_shared_experts) * config.expert_hidden * config.use_moe)
        token_bytes = 4 * (8 * config.n_embd + hidden)
        return max(1, BATCH_BYTES[windows.device.type] // (token_bytes * windows.length))

    def _logits_in_blocks(self, hidden_BTC: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (N, V) and targets (N,) of as many tokens at a time as `LOGITS_BYTES` hold, at least one."""
        at_once = max(1, LOGITS_BYTES[hidden_BTC.device.type] // (4 * self.model.vocab_size))
        hidden, targets = hidden_BTC.flatten(0, 1).split(at_once), targets_BT.flatten().split(at_once)
        for hidden_NC, targets_N in zip(hidden, targets, strict=True):
            yield self.model.logits(hidden_NC), targets_N

    def _losses(self, hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss (B, T) of each target, 0 where it is ignored."""
        blocks = self._logits_in_blocks(hidden_BTC, targets_BT)
        losses = [token_losses(logits_NV[None], targets_N[None])[0] for logits_NV, targets_N in blocks]
        return torch.cat(losses).view_as(targets_BT)

    def _losses_and_predictions(self, hidden_BTC: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """`_losses`, and the likeliest token (B, T) in place of each target."""
        losses: list[Tensor] = []
        predicted: list[Tensor] = []
        for logits_NV, targets_N in self._logits_in_blocks(hidden_BTC, targets_BT):
            losses.append(token_losses(logits_NV[None], targets_N[None])[0])
            predicted.append(logits_NV.argmax(-1))
        return torch.cat(losses).view_as(targets_BT), torch.cat(predicted).view_as(targets_BT)
