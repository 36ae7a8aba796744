"""What a block's feed-forward part, an MLP or a mixture of experts, offers to the pass through a micro-batch."""

from abc import ABC, abstractmethod

import numpy as np

from nanomoe.compiling import Floats
from nanomoe.training.steps.buffers import Buffer
from nanomoe.training.steps.loops.compiling import Keys

Drop = tuple[np.uint32, np.float32]
"""A dropout as loops take it: the cut and the scale."""


class FeedForward(ABC):
    """A feed-forward part: its weights, and what its way back needs of its way there.

    What comes after it, a bias and a dropout of the whole output, is the caller's, who adds the output to the residual
    stream in one loop with both.
    """

    bias: Floats
    """(C,): added to the output; zeros where that has its biases already."""
    d_bias: Floats
    """(C,): what the gradient of that bias is added to."""
    drop: Drop
    """The dropout of the whole output."""

    @abstractmethod
    def forward(self, x: Buffer, keys: Keys, out: Buffer) -> None:
        """Set `out` (N, C) from `x` (N, C). `keys` (sites, B, P, 2): of the layer's planes."""

    @abstractmethod
    def backward(self, x: Buffer, keys: Keys, d_out: Buffer, d_x: Buffer, share: float, *, adds: bool) -> None:
        """Set `d_x` (N, C) from `d_out` (N, C), and the gradients of matrices, or add to those; to others it adds.

        `x` and `keys` are those of the last `forward`. `share`: the micro-batch's of the step's targets, by which
        losses of this part's own are weighted.
        """
