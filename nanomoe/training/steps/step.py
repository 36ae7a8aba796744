"""What every way of doing an optimizer step offers to a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from nanomoe.model.moe import MoE

MOST_UNREAD = 4096
"""Steps whose figures are kept where nobody reads them."""


class Part(NamedTuple):
    """What one micro-batch contributes to an optimizer step, beside its gradient. Nothing of it has been read yet."""

    loss: Tensor
    """Sum of the micro-batch's cross-entropies over the number of targets of the whole step, 0-dim."""
    counts: dict[int, Tensor]
    """{MoE layer: assignments to each expert, before dropping}."""
    dropped: dict[int, Tensor]
    """{MoE layer: assignments beyond the capacity}, 0-dim."""


class Planned(NamedTuple):
    """An optimizer step that is still to be done."""

    micro_batches: list[list[int]]
    """The windows of each."""
    lr: float
    """Its learning rate."""


class Figures(NamedTuple):
    """What a step reports, 0-dim tensors that nobody has read yet. They are to be read within `MOST_UNREAD` steps."""

    loss: Tensor
    """Cross-entropy in nats per target, dropout on."""
    grad_norm: Tensor
    """Norm of the whole gradient before clipping."""


class CaptureFailed(RuntimeError):
    """A step could not be captured; nothing of it has been done."""


class TrainingStep(ABC):
    """One way of doing an optimizer step: gradients of its micro-batches, then the update of the weights."""

    lr: float
    """Learning rate of the next update."""

    @abstractmethod
    def begin(self) -> None:
        """Forget all gradients.

        Raises:
            RuntimeError: memory ran out.
            CaptureFailed: the step cannot be done in this way after all.
        """

    @abstractmethod
    def add(self, index: int, windows: Sequence[int], n_targets: int) -> Part:
        """Add the gradient of a micro-batch of step `index` (from 0), which has `n_targets` targets in all.

        Raises:
            RuntimeError: memory ran out; `begin` starts over.
            CaptureFailed: the step cannot be done in this way after all; `begin` of another starts over.
        """

    @abstractmethod
    def update(self) -> Figures:
        """Clip the gradient if the config says so and change the weights; what the step reports."""

    def look_ahead(self, plan: Callable[[int], Planned | None]) -> None:  # noqa: B027 - few care what comes
        """Be told which steps are to come: `plan` gives that of an index (from 0), None after the last. What is done
        may differ from it."""

    def balance(self, moe_layers: Mapping[int, MoE], counts: Mapping[int, Tensor]) -> None:
        """After `update`: change the balance bias of each mixture by the assignments of the whole step to each of its
        experts, before dropping."""
        for layer, moe in moe_layers.items():
            moe.update_balance_bias(counts[layer])

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state for a snapshot: `step.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` of each parameter."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state over from a snapshot, which may hold other tensors too.

        Raises:
            KeyError: the state of a parameter is missing.
        """
