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

    Every thread of a team calls each method, which does that thread's share. What comes after it, a bias and a dropout
    of the whole output, is the caller's, who adds the output to the residual stream in one loop with both.
    """

    bias: Floats
    """(C,): added to the output; zeros where that has its biases already."""
    d_bias: list[Floats]
    """(C,) for each thread: what the gradient of that bias is added to."""
    drop: Drop
    """The dropout of the whole output."""

    @abstractmethod
    def forward(self, thread: int, x: Buffer, keys: Keys, out: Buffer) -> None:
        """Set the thread's rows of `out` (N, C) from `x` (N, C), of which it has set the same rows. `keys`
        (sites, B, P, 2): of the layer's planes."""

    @abstractmethod
    def backward(self, thread: int, keys: Keys, d_out: Buffer, d_x: Buffer, share: float, *, adds: bool) -> None:
        """Set the thread's rows of `d_x` (N, C) from `d_out` (N, C), of which it has set the same rows; add to the
        gradients of vectors.

        `keys` are those of the last `forward`. `share`: the micro-batch's of the step's targets, by which losses of
        this part's own are weighted.
        """

    @abstractmethod
    def add_gradients(self, thread: int, x: Buffer, d_out: Buffer, *, adds: bool) -> None:
        """Set the thread's part of the gradients of matrices, or add to it, once every thread has returned from
        `backward`: all of `x`, `d_out` and what lies between them is there."""
