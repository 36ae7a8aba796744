"""Stacked MLPs, each on rows of its own, written out; `nanomoe.model.moe.Experts` is their reference."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nanomoe.compiling import Floats
from nanomoe.training.steps.buffers import Buffer, ExpertMatrix
from nanomoe.training.steps.loops import expert_rows
from nanomoe.training.steps.loops.routing import Integers
from nanomoe.training.steps.parameters import FlatParameters

Rows = Sequence[Tensor]
"""The rows of each expert, or these transposed; then whatever."""


class Experts:
    """Experts of one layer, Linear C -> F, GELU, Linear F -> C; their rows lie expert by expert."""

    def __init__(self, parameters: FlatParameters, name: str, n_experts: int, C: int, wide: Buffer) -> None:
        """`name`: of the module, which is not there where it has no expert. `wide` (A, F): for what no layer keeps, of
        at most A rows; its type is that of the products."""
        (A, F), dtype = wide.tensor.shape, wide.tensor.dtype
        none: list[ExpertMatrix] = []
        self._w_in, self._w_out = (parameters.experts.get(f"{name}.{matrix}", none) for matrix in ("w_in", "w_out"))
        self._b_in, self._d_b_in = parameters.vector(f"{name}.b_in", _zeros(n_experts, F))
        self.b_out, self.d_b_out = parameters.vector(f"{name}.b_out", _zeros(n_experts, C))
        self.out = Buffer(A, C, dtype)
        """Their outputs without the bias; in place of them, once that is known, the gradient."""
        self._wide = wide
        self._hidden, self._slope = (Buffer(A, F, dtype) for _ in range(2))
        self._starts_E1 = np.zeros(n_experts + 1, np.int64)
        self._sizes: list[int] = []
        """Rows of each expert, then those of none."""
        # Views for the way back: making one costs as much as a small loop.
        self._x_transposed: Rows = []
        self._wide_rows: Rows = []
        self._out_rows: Rows = []

    def forward(self, x: Rows, x_transposed: Rows, starts_E1: Integers) -> None:
        """Set `out` from the rows of each expert; `starts_E1` says where they lie in `out`."""
        if not self._w_in:
            return
        self._starts_E1, self._x_transposed = starts_E1, x_transposed
        self._sizes = sizes = sizes_of(starts_E1, len(self.out.array))
        self._wide_rows, self._out_rows = self._wide.split(sizes), self.out.split(sizes)
        for size, matrix, rows, u in zip(sizes, self._w_in, x, self._wide_rows, strict=False):
            if size:
                torch.mm(rows, matrix.weight, out=u)
        expert_rows.gelu_by_expert(self._wide.array, starts_E1, self._b_in, self._hidden.array, self._slope.array)
        for size, matrix, h, y in zip(sizes, self._w_out, self._hidden.split(sizes), self._out_rows, strict=False):
            if size:
                torch.mm(h, matrix.weight, out=y)

    def backward(self, d_x: Buffer, *, adds: bool) -> None:
        """From the gradient in `out` to that of the rows, and those of the weights, or onto these."""
        if not self._w_in:
            return
        sizes = self._sizes
        self._through(self._w_out, self._hidden.split_transposed(sizes), self._out_rows, self._wide_rows, adds=adds)
        expert_rows.gelu_by_expert_backward(self._wide.array, self._starts_E1, self._slope.array, self._d_b_in)
        self._through(self._w_in, self._x_transposed, self._wide_rows, d_x.split(sizes), adds=adds)

    def _through(self, matrices: list[ExpertMatrix], x_transposed: Rows, d_out: Rows, d_x: Rows, *, adds: bool) -> None:
        for size, matrix, x_t, d_y, d in zip(self._sizes, matrices, x_transposed, d_out, d_x, strict=False):
            if size:
                matrix.add_gradient(x_t, d_y, adds=adds)
                torch.mm(d_y, matrix.transposed, out=d)
            elif not adds:
                matrix.gradient.zero_()


def sizes_of(starts_E1: Integers, n_rows: int) -> list[int]:
    """Rows of each expert, then those of none, of `n_rows` in all."""
    return [end - first for first, end in pairwise([*starts_E1.tolist(), n_rows])]


def _zeros(n_rows: int, n_columns: int) -> tuple[Floats, Floats]:
    return np.zeros((n_rows, n_columns), np.float32), np.zeros((n_rows, n_columns), np.float32)
