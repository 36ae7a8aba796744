"""What a block's feed-forward part, an MLP or a mixture of experts, offers to the pass through a micro-batch."""

from abc import ABC, abstractmethod

import numpy as np

from nanomoe.compiling import Array, Floats
from nanomoe.training.steps.buffers import Buffer

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
    def forward(self, x: Buffer, keys_BP2: Array, out: Buffer) -> None:
        """Set `out` (N, C) from `x` (N, C). `keys_BP2`: of the dropout's planes."""

    @abstractmethod
    def backward(self, x: Buffer, keys_BP2: Array, d_out: Buffer, d_x: Buffer, *, adds: bool) -> None:
        """Set `d_x` (N, C) from `d_out` (N, C), and the gradients of matrices, or add to those; to others it adds.

        `x` and `keys_BP2` are those of the last `forward`.
        """
