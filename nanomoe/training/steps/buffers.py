"""Memory that matrix products by torch and compiled loops share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanomoe.compiling import Array


def as_array(tensor: Tensor) -> Array:
    """The array of a tensor's numbers, or of their bits where numpy has no such type."""
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class Buffer:
    """A matrix (rows, columns) as products take it and as loops do; made once, since a view costs as much as a loop."""

    def __init__(self, n_rows: int, n_columns: int, dtype: torch.dtype, *, n_matrices: int = 1) -> None:
        """Zeros. `n_matrices`: batched products take so many, one below the other."""
        self.tensor = torch.zeros(n_rows, n_columns, dtype=dtype)
        self.transposed = self.tensor.t()
        self.array = as_array(self.tensor)
        self.batch = self.tensor.view(n_matrices, -1, n_columns)
        self.batch_transposed = self.batch.mT

    def split(self, sizes: list[int]) -> Sequence[Tensor]:
        """The first so many rows, the next so many, and so on, to the last."""
        parts: Sequence[Tensor] = self.tensor.split_with_sizes(sizes)
        return parts

    def split_transposed(self, sizes: list[int]) -> Sequence[Tensor]:
        """The same parts, transposed."""
        parts: Sequence[Tensor] = self.transposed.split_with_sizes(sizes, 1)
        return parts


class Matrix:
    """A weight matrix (out, in) and its gradient, as products take them."""

    def __init__(self, weight: Tensor, gradient: Tensor) -> None:
        self.weight = weight
        self.transposed = weight.t()
        self.gradient = gradient

    def add_gradient(self, d_out_transposed: Tensor, x: Tensor, *, adds: bool) -> None:
        """Set the gradient to d_out^T x, or add that to it."""
        if adds:
            torch.addmm(self.gradient, d_out_transposed, x, out=self.gradient)
        else:
            torch.mm(d_out_transposed, x, out=self.gradient)


class ExpertMatrix:
    """The weight matrix (in, out) of one expert and its gradient, as products take them."""

    def __init__(self, weight: Tensor, gradient: Tensor) -> None:
        self.weight = weight
        self.transposed = weight.t()
        self.gradient = gradient

    def add_gradient(self, x_transposed: Tensor, d_out: Tensor, *, adds: bool) -> None:
        """Set the gradient to x^T d_out, or add that to it."""
        if adds:
            torch.addmm(self.gradient, x_transposed, d_out, out=self.gradient)
        else:
            torch.mm(x_transposed, d_out, out=self.gradient)
