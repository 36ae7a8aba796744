"""Stacked MLPs, each on rows of its own, written out; `nanomoe.model.moe.Experts` is their reference."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanomoe.compiling import Floats
from nanomoe.training.steps.buffers import Buffer, ExpertMatrix
from nanomoe.training.steps.loops import expert_rows
from nanomoe.training.steps.loops.routing import Integers
from nanomoe.training.steps.parameters import FlatParameters


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
        self._rows: Sequence[Tensor] = []
        self._starts_E1 = np.zeros(n_experts + 1, np.int64)
        self._sizes: list[int] = []

    def forward(self, rows: Sequence[Tensor], starts_E1: Integers) -> None:
        """Set `out`. `rows`: those of each expert; `starts_E1`: where they lie in `out`."""
        self._rows, self._starts_E1 = rows, starts_E1
        self._sizes = np.diff(starts_E1).tolist()
        wide, hidden, out = (split_rows(buffer, self._sizes) for buffer in (self._wide, self._hidden, self.out))
        for matrix, x, u in zip(self._w_in, rows, wide, strict=False):
            if len(x):
                torch.mm(x, matrix.weight, out=u)
        expert_rows.gelu_by_expert(self._wide.array, starts_E1, self._b_in, self._hidden.array, self._slope.array)
        for matrix, h, y in zip(self._w_out, hidden, out, strict=False):
            if len(h):
                torch.mm(h, matrix.weight, out=y)

    def backward(self, d_rows: Buffer, *, adds: bool) -> None:
        """From the gradient in `out` to that of the rows, and those of the weights, or onto these."""
        buffers = self._wide, self._hidden, self.out, d_rows
        wide, hidden, d_out, d_x = (split_rows(buffer, self._sizes) for buffer in buffers)
        for matrix, h, d_y, d_h in zip(self._w_out, hidden, d_out, wide, strict=False):
            if len(h):
                matrix.add_gradient(h.t(), d_y, adds=adds)
                torch.mm(d_y, matrix.transposed, out=d_h)
            elif not adds:
                matrix.gradient.zero_()
        expert_rows.gelu_by_expert_backward(self._wide.array, self._starts_E1, self._slope.array, self._d_b_in)
        for matrix, x, d_u, d in zip(self._w_in, self._rows, wide, d_x, strict=False):
            if len(x):
                matrix.add_gradient(x.t(), d_u, adds=adds)
                torch.mm(d_u, matrix.transposed, out=d)
            elif not adds:
                matrix.gradient.zero_()


def split_rows(buffer: Buffer, sizes: list[int]) -> Sequence[Tensor]:
    """The rows of each expert, and those of none."""
    parts: Sequence[Tensor] = buffer.tensor.split([*sizes, len(buffer.tensor) - sum(sizes)])
    return parts


def _zeros(n_rows: int, n_columns: int) -> tuple[Floats, Floats]:
    return np.zeros((n_rows, n_columns), np.float32), np.zeros((n_rows, n_columns), np.float32)
