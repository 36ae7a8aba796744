"""A decoding step on a GPU as a captured CUDA graph.

A graph has fixed shapes and addresses: it computes all rows of the cache, whether they are in use or not. Knows no
model: what is captured is a function of tokens and positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomoe.cuda_graphs import CudaGraphs, Program

Advance = Callable[[Tensor], Tensor]
"""From tokens and positions (2, R) to hidden states (R, C)."""


@dataclass(frozen=True)
class _Captured:
    program: Program
    inputs_2R: Tensor
    """Tokens and positions, to be overwritten before a replay."""
    hidden_RC: Tensor
    """Overwritten by each replay."""


class GraphedStep:
    """A step, captured at its first call. Given with each call and not kept: who owns both would never be freed before
    the garbage collector looks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs = CudaGraphs(device)
        self._captured: _Captured | None = None

    def __call__(self, advance: Advance, given_2R: Tensor) -> Tensor:
        """The hidden states (R, C), valid until the next call.

        Args:
            advance: must be the same function at every call, and its step the same when it is done again.
            given_2R: tokens and positions, on the CPU, of the same shape at every call.
        """
        with torch.cuda.device(self._device):
            if self._captured is None:
                self._captured = self._capture(advance, given_2R.to(self._device))
            self._captured.inputs_2R.copy_(given_2R)
            self._captured.program.replay()
        return self._captured.hidden_RC

    def _capture(self, advance: Advance, inputs_2R: Tensor) -> _Captured:
        made: list[Tensor] = []
        # Warm-ups take this step's own inputs: it is merely done more than once.
        program = self._graphs.capture(lambda: made.append(advance(inputs_2R)))
        return _Captured(program, inputs_2R, made[-1])
