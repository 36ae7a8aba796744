"""A decoding step on a GPU as a captured CUDA graph: one launch in place of a hundred.

A graph has fixed shapes and addresses: there is one for each number of rows and each length of the cache that is read.
Knows no model: what is captured is a function of tokens and positions.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Advance = Callable[[Tensor, Tensor, int], tuple[Tensor, list[Tensor]]]
"""From tokens (N,), positions (N,) and the cached length to hidden states (N, C) and what experts were chosen by."""

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
    inputs_2N: Tensor
    """Tokens and positions, to be overwritten before a replay."""
    outputs: tuple[Tensor, list[Tensor]]
    """Overwritten by each replay."""


class GraphedStep:
    """A step, captured at the first call of each shape. Given with each call and not kept: who owns both would never be
    freed before the garbage collector looks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = _capture_stream(torch.cuda.current_device())
        self.forget()

    def forget(self) -> None:
        """Drop all graphs: what they read or write has moved."""
        self._captured: dict[tuple[int, int], _Captured] = {}
        # Graphs that run one after another share memory. A pool that no graph holds any more cannot be used again.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, advance: Advance, tokens: Sequence[int], positions: Sequence[int], length: int, *, n_rows: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The outputs of the first rows, valid until the next call.

        Args:
            advance: must be the same function at every call, and its step the same when it is done again.
            tokens: of the first rows; the rows beyond, up to `n_rows`, are written at position 0.
            positions: of the tokens.
            length: of the cache that is read.
            n_rows: of the graph; one is captured for each number.
        """
        padding = [0] * (n_rows - len(tokens))
        given_2N = torch.tensor([[*tokens, *padding], [*positions, *padding]])
        with torch.cuda.device(self._device):
            captured = self._captured.get((n_rows, length))
            if captured is None:
                with _ONE_CAPTURE_AT_A_TIME:
                    captured = self._capture(advance, given_2N.to(self._device), length)
                self._captured[n_rows, length] = captured
            captured.inputs_2N.copy_(given_2N)
            captured.graph.replay()
        hidden_NC, wanted = captured.outputs
        return hidden_NC[: len(tokens)], [each[: len(tokens)] for each in wanted]

    def _capture(self, advance: Advance, inputs_2N: Tensor, length: int) -> _Captured:
        # Warm-ups run on the stream of the capture, so that cuBLAS has its workspace for that stream before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):  # with this step's own inputs: it is merely done more than once
                advance(inputs_2N[0], inputs_2N[1], length)
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does is captured: others load checkpoints meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = advance(inputs_2N[0], inputs_2N[1], length)
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Captured(graph, inputs_2N, outputs)
