"""The MLP of a dense block, written out: Linear C -> 4C, GELU, Linear 4C -> C."""

import torch

from nanomoe.training.steps.buffers import Buffer
from nanomoe.training.steps.feed_forward import Drop, FeedForward
from nanomoe.training.steps.loops import backward, forward
from nanomoe.training.steps.loops.compiling import Keys
from nanomoe.training.steps.parameters import FlatParameters
from nanomoe.training.steps.team import Team


class DenseFeedForward(FeedForward):
    """An MLP over N rows."""

    def __init__(self, parameters: FlatParameters, name: str, drop: Drop, wide: Buffer, team: Team) -> None:
        """`name`: of the module. `wide` (N, 4C): for what no layer keeps; its type is that of the products."""
        self.drop = drop
        self._wide, self._team = wide, team
        n_rows, n_columns = wide.tensor.shape
        self._in = parameters.matrices[f"{name}.c_fc.weight"]
        self._in_bias, self._d_in_bias = parameters.vector(f"{name}.c_fc.bias", n_columns)
        self._hidden, self._slope = (Buffer(n_rows, n_columns, wide.tensor.dtype, team) for _ in range(2))
        self._out = parameters.matrices[f"{name}.c_proj.weight"]
        self.bias, self.d_bias = parameters.vector(f"{name}.c_proj.bias", n_columns // 4)

    def forward(self, thread: int, x: Buffer, keys: Keys, out: Buffer) -> None:
        rows, wide = self._team.share(len(x.tensor), thread), self._wide
        torch.mm(x.rows[thread], self._in.transposed, out=wide.rows[thread])
        forward.gelu(rows.start, rows.stop, wide.array, self._in_bias, self._hidden.array, self._slope.array)
        torch.mm(self._hidden.rows[thread], self._out.transposed, out=out.rows[thread])

    def backward(self, thread: int, keys: Keys, d_out: Buffer, d_x: Buffer, share: float, *, adds: bool) -> None:
        rows, wide = self._team.share(len(d_x.tensor), thread), self._wide
        torch.mm(d_out.rows[thread], self._out.weight, out=wide.rows[thread])
        backward.gelu_backward(rows.start, rows.stop, wide.array, self._slope.array, self._d_in_bias[thread])
        torch.mm(wide.rows[thread], self._in.weight, out=d_x.rows[thread])

    def add_gradients(self, thread: int, x: Buffer, d_out: Buffer, *, adds: bool) -> None:
        self._in.add_gradient(thread, self._wide.columns[thread], x.tensor, adds=adds)
        self._out.add_gradient(thread, d_out.columns[thread], self._hidden.tensor, adds=adds)
