"""A decoding step on a GPU as a captured CUDA graph: one launch in place of a hundred, which is most of its time.

A graph has fixed shapes and addresses: there is one for each power of two of rows and each length of the cache that is
read. Knows no model: what is captured is a function of tokens and positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Advance = Callable[[Tensor, Tensor, int], tuple[Tensor, list[Tensor]]]
"""From tokens (N,), positions (N,) and the cached length to hidden states (N, C) and what experts were chosen by."""

_WARM_UPS = 2
"""Runs before the capture, in which libraries choose their kernels and get their workspaces."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs_2N: Tensor
    """Tokens and positions, to be overwritten before a replay."""
    outputs: tuple[Tensor, list[Tensor]]
    """Overwritten by each replay."""


class GraphedStep:
    """`advance`, captured at the first call of each shape. What it does must not change when it is done again."""

    def __init__(self, advance: Advance, device: torch.device) -> None:
        self._advance, self._device = advance, device
        self._captured: dict[tuple[int, int], _Captured] = {}

    def forget(self) -> None:
        """Drop all graphs: what they read or write has moved."""
        self._captured.clear()

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], length: int) -> tuple[Tensor, list[Tensor]]:
        """The outputs of the first rows, valid until the next call. Rows up to the next power of two are written too,
        at position 0."""
        n_rows = 1 << (len(tokens) - 1).bit_length()
        padding = [0] * (n_rows - len(tokens))
        given_2N = torch.tensor([[*tokens, *padding], [*positions, *padding]])
        captured = self._captured.get((n_rows, length))
        if captured is None:
            captured = self._captured[n_rows, length] = self._capture(given_2N.to(self._device), length)
        captured.inputs_2N.copy_(given_2N)
        captured.graph.replay()
        hidden_NC, wanted = captured.outputs
        return hidden_NC[: len(tokens)], [each[: len(tokens)] for each in wanted]

    def _capture(self, inputs_2N: Tensor, length: int) -> _Captured:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):  # with this step's own inputs: it is merely done more than once
                self._advance(inputs_2N[0], inputs_2N[1], length)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._advance(inputs_2N[0], inputs_2N[1], length)
        return _Captured(graph, inputs_2N, outputs)
