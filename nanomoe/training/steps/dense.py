"""The MLP of a dense block, written out: Linear C -> 4C, GELU, Linear 4C -> C."""

import torch

from nanomoe.compiling import Floats
from nanomoe.training.steps.buffers import Buffer
from nanomoe.training.steps.feed_forward import Drop, FeedForward
from nanomoe.training.steps.loops import backward, forward
from nanomoe.training.steps.loops.compiling import Keys
from nanomoe.training.steps.parameters import FlatParameters


class DenseFeedForward(FeedForward):
    """An MLP over N rows."""

    def __init__(
        self, parameters: FlatParameters, name: str, no_bias: tuple[Floats, Floats], drop: Drop, wide: Buffer
    ) -> None:
        """`name`: of the module. `no_bias`: stands in for a bias and its gradient. `wide` (N, 4C): for what no layer
        keeps; its type is that of the products."""
        self.drop = drop
        self._wide = wide
        self._in = parameters.matrices[f"{name}.c_fc.weight"]
        self._in_bias, self._d_in_bias = parameters.vector(f"{name}.c_fc.bias", no_bias)
        n_rows, n_columns = wide.tensor.shape
        self._hidden, self._slope = (Buffer(n_rows, n_columns, wide.tensor.dtype) for _ in range(2))
        self._out = parameters.matrices[f"{name}.c_proj.weight"]
        self.bias, self.d_bias = parameters.vector(f"{name}.c_proj.bias", no_bias)

    def forward(self, x: Buffer, keys: Keys, out: Buffer) -> None:
        torch.mm(x.tensor, self._in.transposed, out=self._wide.tensor)
        forward.gelu(self._wide.array, self._in_bias, self._hidden.array, self._slope.array)
        torch.mm(self._hidden.tensor, self._out.transposed, out=out.tensor)

    def backward(self, x: Buffer, keys: Keys, d_out: Buffer, d_x: Buffer, share: float, *, adds: bool) -> None:
        wide = self._wide
        self._out.add_gradient(d_out.transposed, self._hidden.tensor, adds=adds)
        torch.mm(d_out.tensor, self._out.weight, out=wide.tensor)
        backward.gelu_backward(wide.array, self._slope.array, self._d_in_bias)
        self._in.add_gradient(wide.transposed, x.tensor, adds=adds)
        torch.mm(wide.tensor, self._in.weight, out=d_x.tensor)
