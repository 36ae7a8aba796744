"""What takes part in a measurement of steps, and the loss by which one sees that all do the same work."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanomoe.data import IGNORE, Windows


class NotMeasured(Exception):
    """This machine, or this version, cannot do the work in that way; the text says why."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the same optimizer steps."""

    step: Callable[[], object]
    """Do the next optimizer step; on a GPU it may still be under way afterwards."""

    loss: Callable[[], float]
    """The text's loss with the weights as they are, without dropout, in float32: nats per token."""

    model: nn.Module
    """What is trained."""

    precision: str
    """Type of activations and matrix products."""

    n_threads: int
    """Threads of an operation on the CPU."""


def text_loss(logits_of: Callable[[Tensor], Tensor], windows: Windows, batch_size: int) -> float:
    """The loss of a text. `logits_of`: from inputs (B, T) to logits (B, T, V)."""
    total, n_targets = 0.0, 0
    with torch.no_grad():
        for batch in windows.batches(batch_size):
            inputs_BT, targets_BT = windows.batch(batch)
            total += float(cross_entropy(logits_of(inputs_BT), targets_BT, reduction="sum"))
            n_targets += windows.n_targets(batch)
    return total / n_targets


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of the targets that count, in float32."""
    flat = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(flat, targets_BT.flatten(), ignore_index=IGNORE, reduction=reduction)
