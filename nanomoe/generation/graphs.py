"""A decoding step on a GPU as a captured CUDA graph: one launch in place of a hundred.

A graph has fixed shapes and addresses: it computes all rows of the cache, whether they are in use or not. Knows no
model: what is captured is a function of tokens and positions.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Advance = Callable[[Tensor], Tensor]
"""From tokens and positions (2, R) to hidden states (R, C)."""

_WARM_UPS = 2
"""Runs before the capture, in which libraries choose their kernels and get their workspaces."""

_ONE_CAPTURE_AT_A_TIME = threading.Lock()


@functools.cache
def _capture_stream(device_index: int) -> torch.cuda.Stream:
    """The stream on which this process captures on a device. There is one, because cuBLAS keeps a workspace of 32 MiB
    for each stream that it has ever run on, and never frees it."""
    with torch.cuda.device(device_index):
        return torch.cuda.Stream()


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs_2R: Tensor
    """Tokens and positions, to be overwritten before a replay."""
    hidden_RC: Tensor
    """Overwritten by each replay."""


class GraphedStep:
    """A step, captured at its first call. Given with each call and not kept: who owns both would never be freed before
    the garbage collector looks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = _capture_stream(torch.cuda.current_device())
        self._captured: _Captured | None = None

    def __call__(self, advance: Advance, given_2R: Tensor) -> Tensor:
        """The hidden states (R, C), valid until the next call.

        Args:
            advance: must be the same function at every call, and its step the same when it is done again.
            given_2R: tokens and positions, on the CPU, of the same shape at every call.
        """
        with torch.cuda.device(self._device):
            if self._captured is None:
                with _ONE_CAPTURE_AT_A_TIME:
                    self._captured = self._capture(advance, given_2R.to(self._device))
            self._captured.inputs_2R.copy_(given_2R)
            self._captured.graph.replay()
        return self._captured.hidden_RC

    def _capture(self, advance: Advance, inputs_2R: Tensor) -> _Captured:
        # Warm-ups run on the stream of the capture, so that cuBLAS has its workspace for that stream before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):  # with this step's own inputs: it is merely done more than once
                advance(inputs_2R)
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does is captured: others load checkpoints meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            hidden_RC = advance(inputs_2R)
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Captured(graph, inputs_2R, hidden_RC)
