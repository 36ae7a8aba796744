"""A model's parameters, gradients and moments as flat float32 buffers, and AdamW on them.

The model's parameters become views of one of the buffers, so that whoever reads the model sees what was learnt.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nanomoe.compiling import Array, Floats, even_bounds, in_parts
from nanomoe.config import TrainConfig
from nanomoe.model.gpt import GPT
from nanomoe.training.optim import decays
from nanomoe.training.steps.buffers import ExpertMatrix, Matrix, as_array
from nanomoe.training.steps.loops.update import Rates, accumulate, adamw, sum_of_squares
from nanomoe.training.steps.team import Team

_ALIGNED = 16
"""Numbers to whose multiples a parameter's place is rounded up: a cache line."""

_ROW = 4096
"""Numbers of a row of the flat buffers: the loops sum a gradient's squares row by row."""

_POSITIONS = "transformer.wpe.weight"


class FlatParameters:
    """The buffers, each in three parts: matrices whose gradient is a product in the products' type; the positions'
    embeddings and routers, which decay as these do, but whose gradients are added to in float32; and vectors, which do
    not decay."""

    def __init__(self, model: GPT, config: TrainConfig, dtype: torch.dtype, team: Team) -> None:
        """`dtype`: type of the products."""
        self._config = config
        self._team = team
        named = dict(model.named_parameters())
        matrices = [name for name, p in named.items() if decays(name, p) and not _is_wide(name)]
        wide = [name for name in named if _is_wide(name)]
        vectors = [name for name, p in named.items() if not decays(name, p)]
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self._bounds = [0]
        end = 0
        for part in (matrices, wide, vectors):
            for name in part:
                self._places[name] = end, named[name].shape
                end += -(-named[name].numel() // _ALIGNED) * _ALIGNED
            end = -(-end // _ROW) * _ROW
            self._bounds.append(end)
        self._weights, self._gradients, self._exp_avg, self._exp_avg_sq = (torch.zeros(end) for _ in range(4))
        self.weights, self.gradients = self._views(self._weights), self._views(self._gradients)
        """Each parameter, and its gradient, by the parameter's name in the model."""
        for name, parameter in named.items():
            self.weights[name].copy_(parameter.data)
            parameter.data = self.weights[name]
            parameter.grad = None
        # A vector's gradient is a sum over the rows, of which each thread has some.
        others = [torch.zeros(end - self._bounds[2]) for _ in range(1, team.n_threads)]
        self._vector_gradients = [self._gradients[self._bounds[2] :], *others]
        self._is_narrow = dtype == torch.bfloat16
        # In bfloat16 the products read a copy of the weights, and a micro-batch's gradients come out so.
        narrow = self._bounds[1] if self._is_narrow else 0
        self._copies, self._narrow_gradients = (torch.zeros(narrow, dtype=torch.bfloat16) for _ in range(2))
        weights, gradients = self.weights, self.gradients
        if self._is_narrow:
            weights, gradients = (self._views(flat, matrices) for flat in (self._copies, self._narrow_gradients))
            self._copies.copy_(self._weights[:narrow])
        stacks = [name for name in matrices if weights[name].dim() == 3]
        self.matrices = {name: Matrix(weights[name], gradients[name], team) for name in matrices if name not in stacks}
        """Each matrix whose gradient is a product, as products take it."""
        self.experts = {name: list(map(ExpertMatrix, weights[name], gradients[name])) for name in stacks}
        """Each stack of experts' matrices, as products take them."""
        self.constants = dict(model.named_buffers())
        """What the model computes with and no gradient changes, by its name in the model."""

    def _views(self, flat: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
        places = [(name, *self._places[name]) for name in (self._places if names is None else names)]
        return {name: flat[place : place + shape.numel()].view(shape) for name, place, shape in places}

    def positions(self) -> tuple[Floats, Floats]:
        """The positions' embeddings and their gradient as loops take them."""
        return as_array(self.weights[_POSITIONS]), as_array(self.gradients[_POSITIONS])

    def vector(self, name: str, *shape: int) -> tuple[Floats, list[Floats]]:
        """A vector, or a stack of them, as loops take it, and each thread's part of its gradient, a sum of them all.
        Where the model has none by this name, zeros stand in for it, and for a gradient that nobody reads."""
        if name not in self.weights:
            return np.zeros(shape, np.float32), [np.zeros(shape, np.float32) for _ in self._vector_gradients]
        first = self._places[name][0] - self._bounds[2]
        parts = [flat[first : first + math.prod(shape)].view(shape) for flat in self._vector_gradients]
        return as_array(self.weights[name]), [as_array(part) for part in parts]

    def moments(self) -> dict[str, Tensor]:
        """The averages of each parameter's gradient and squared gradient, by the names under which they are saved."""
        flats = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        return {f"{key}.{name}": view for key, flat in flats.items() for name, view in self._views(flat).items()}

    def forget_gradients(self) -> None:
        """Set to zero what is added to; what is a product's result is overwritten."""
        self._gradients[self._bounds[1] :].zero_()

    def add_up_vectors(self) -> None:
        """Add what every thread has of the vectors' gradients."""
        whole, *others = self._vector_gradients
        for part in others:
            whole.add_(part)
            part.zero_()

    def gather_gradients(self, *, is_first: bool) -> None:
        """Add a micro-batch's gradients to those of the step, where the products leave them apart."""
        if self._is_narrow:
            whole = self._gradients[: self._bounds[1]]
            if is_first:
                whole.zero_()
            accumulate(_rows(self._narrow_gradients), _rows(whole))

    def update(self, lr: float, step: int, *, is_gathered: bool) -> float:
        """Clip the gradient and change the weights, in the step of this number (from 1); the gradient's norm before."""
        config = self._config
        parts = [slice(*bounds) for bounds in pairwise(self._bounds)]
        gradients = [_rows(self._gradients[part]) for part in parts]
        if self._is_narrow and not is_gathered:
            gradients[0] = _rows(self._narrow_gradients)
        clip = 1.0
        if config.grad_clip is not None:
            norm = math.sqrt(sum(map(_squares, gradients)))
            clip = min(1.0, config.grad_clip / (norm + 1e-6))
        squares = 0.0
        for part, gradient, decay in zip(
            parts, gradients, (config.weight_decay, config.weight_decay, 0.0), strict=True
        ):
            weights, mean, mean_sq = (_rows(flat[part]) for flat in (self._weights, self._exp_avg, self._exp_avg_sq))
            copy = _rows(self._copies if part.start == 0 else self._copies[:0])
            rates = self._rates(lr, step, clip, decay)
            squares += _updated(rates, gradient, weights, mean, mean_sq, copy)
        return math.sqrt(squares)

    def _rates(self, lr: float, step: int, clip: float, decay: float) -> Rates:
        beta1, beta2 = self._config.betas
        size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        numbers = (clip, 1 - lr * decay, size, root, beta1, beta2, self._config.eps)
        return Rates(*map(np.float32, numbers))


def _is_wide(name: str) -> bool:
    return name == _POSITIONS or ".router." in name


def _squares(gradient: Array) -> float:
    return sum(in_parts(lambda first, end: sum_of_squares(gradient[first:end]), _parts(gradient)))


def _updated(rates: Rates, gradient: Array, weights: Floats, mean: Floats, mean_sq: Floats, copy: Array) -> float:
    def of_rows(first: int, end: int) -> float:
        rows = slice(first, end)
        return adamw(rates, gradient[rows], weights[rows], mean[rows], mean_sq[rows], copy[rows])

    return sum(in_parts(of_rows, _parts(weights)))


def _parts(rows: Array) -> list[int]:
    """The bounds of what each of the threads that torch may use takes: a sum over them repeats for equally many."""
    return even_bounds(len(rows), torch.get_num_threads())


def _rows(flat: Tensor) -> Array:
    return as_array(flat.view(-1, _ROW))
