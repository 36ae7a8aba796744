"""Stacked MLPs, each on rows of its own, written out; `nanomoe.model.moe.Experts` is their reference."""

import torch
from torch import Tensor

from nanomoe.training.steps.buffers import Buffer, ExpertMatrix
from nanomoe.training.steps.loops import backward, forward
from nanomoe.training.steps.parameters import FlatParameters
from nanomoe.training.steps.team import Team


class Experts:
    """Experts of one layer, Linear C -> F, GELU, Linear F -> C; their rows lie expert by expert."""

    def __init__(self, parameters: FlatParameters, name: str, n_experts: int, C: int, wide: Buffer, team: Team) -> None:
        """`name`: of the module, which is not there where it has no expert. `wide` (A, F): for what no layer keeps, of
        at most A rows; its type is that of the products."""
        (A, F), dtype = wide.tensor.shape, wide.tensor.dtype
        none: list[ExpertMatrix] = []
        self._w_in, self._w_out = (parameters.experts.get(f"{name}.{matrix}", none) for matrix in ("w_in", "w_out"))
        self._b_in, self._d_b_in = parameters.vector(f"{name}.b_in", n_experts, F)
        self.b_out, self.d_b_out = parameters.vector(f"{name}.b_out", n_experts, C)
        self.out = Buffer(A, C, dtype, team)
        """Their outputs without the bias; in place of them, once that is known, the gradient."""
        self._wide = wide
        self._hidden, self._slope = (Buffer(A, F, dtype, team) for _ in range(2))

    def forward(self, expert: int, rows: slice, x: Tensor) -> None:
        """Set an expert's rows of `out` from their input."""
        if len(x):
            wide, hidden = self._wide, self._hidden
            torch.mm(x, self._w_in[expert].weight, out=wide.tensor[rows])
            forward.gelu(rows.start, rows.stop, wide.array, self._b_in[expert], hidden.array, self._slope.array)
            torch.mm(hidden.tensor[rows], self._w_out[expert].weight, out=self.out.tensor[rows])

    def backward(self, thread: int, expert: int, rows: slice, x: Tensor, d_x: Tensor, *, adds: bool) -> None:
        """From the gradient in an expert's rows of `out` to that of their input; and those of its weights, or onto
        these."""
        w_in, w_out, wide = self._w_in[expert], self._w_out[expert], self._wide
        if len(x):
            d_out, d_hidden = self.out.tensor[rows], wide.tensor[rows]
            w_out.add_gradient(self._hidden.tensor[rows].t(), d_out, adds=adds)
            torch.mm(d_out, w_out.transposed, out=d_hidden)
            backward.gelu_backward(rows.start, rows.stop, wide.array, self._slope.array, self._d_b_in[thread][expert])
            w_in.add_gradient(x.t(), d_hidden, adds=adds)
            torch.mm(d_hidden, w_in.transposed, out=d_x)
        elif not adds:
            w_out.gradient.zero_()
            w_in.gradient.zero_()
