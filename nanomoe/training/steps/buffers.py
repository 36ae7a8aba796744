"""Memory that matrix products by torch and compiled loops share, and each thread's parts of it."""

import torch
from torch import Tensor

from nanomoe.compiling import Array
from nanomoe.training.steps.team import Team


def as_array(tensor: Tensor) -> Array:
    """The array of a tensor's numbers, or of their bits where numpy has no such type."""
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def parts(tensor: Tensor, team: Team) -> list[Tensor]:
    """Each thread's part of a tensor's first dimension."""
    return [tensor[team.share(len(tensor), thread)] for thread in range(team.n_threads)]


class Buffer:
    """A matrix (rows, columns) as products take it and as loops do; made once, since a view costs as much as a loop.

    Lists are by thread: the views of what is that thread's share.
    """

    def __init__(self, n_rows: int, n_columns: int, dtype: torch.dtype, team: Team, *, n_matrices: int = 1) -> None:
        """Zeros. `n_matrices`: batched products take so many, one below the other."""
        self.tensor = torch.zeros(n_rows, n_columns, dtype=dtype)
        self.array = as_array(self.tensor)
        self.rows = parts(self.tensor, team)
        self.columns = parts(self.tensor.t(), team)
        """Columns as rows."""
        self.batch = parts(self.tensor.view(n_matrices, -1, n_columns), team)
        self.batch_transposed = [batch.mT for batch in self.batch]


class Matrix:
    """A weight matrix (out, in) and its gradient, as products take them."""

    def __init__(self, weight: Tensor, gradient: Tensor, team: Team) -> None:
        self.weight = weight
        self.transposed = weight.t()
        self.gradient = gradient
        self._parts = parts(gradient, team)

    def add_gradient(self, thread: int, d_out_columns: Tensor, x: Tensor, *, adds: bool) -> None:
        """Set the thread's part of the gradient to d_out^T x, or add that to it; it takes so many columns of d_out."""
        gradient = self._parts[thread]
        if adds:
            torch.addmm(gradient, d_out_columns, x, out=gradient)
        else:
            torch.mm(d_out_columns, x, out=gradient)


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
