"""The loops that change weights: the gradient's norm, and AdamW in one pass. Arrays are rows of a flat buffer."""

from typing import NamedTuple

import numpy as np

from nanomoe.compiling import Array, Floats
from nanomoe.training.steps.loops.compiling import compiled, compiled_in_any_order
from nanomoe.training.steps.loops.elements import get, put

_ONE = np.float32(1)
_ZERO = np.float32(0)


class Rates(NamedTuple):
    """AdamW's numbers at one step (Loshchilov and Hutter, arXiv 1711.05101), each computed in float64."""

    clip: np.float32
    """What the gradient is multiplied by."""
    keep: np.float32
    """1 - lr * weight_decay."""
    size: np.float32
    """lr / (1 - beta1 ** step)."""
    root: np.float32
    """sqrt(1 - beta2 ** step)."""
    beta1: np.float32
    beta2: np.float32
    eps: np.float32


@compiled_in_any_order
def adamw(rates: Rates, gradient: Array, weights: Floats, exp_avg: Floats, exp_avg_sq: Floats, copy: Array) -> float:
    """Change the weights and the moments, and their copy where that has any row; the sum of the squared gradient before
    clipping."""
    rows, columns = weights.shape
    has_copy = copy.shape[0] > 0
    squares = 0.0
    for row in range(rows):
        in_row = _ZERO
        for c in range(columns):
            plain = get(gradient, row, c)
            in_row += plain * plain
            g = plain * rates.clip
            average = exp_avg[row, c] + (g - exp_avg[row, c]) * (_ONE - rates.beta1)
            square = exp_avg_sq[row, c] * rates.beta2 + (_ONE - rates.beta2) * g * g
            exp_avg[row, c] = average
            exp_avg_sq[row, c] = square
            weights[row, c] = weights[row, c] * rates.keep - rates.size * average / (
                np.sqrt(square) / rates.root + rates.eps
            )
        if has_copy:  # while the row is in the nearest cache
            for c in range(columns):
                put(copy, row, c, weights[row, c])
        squares += np.float64(in_row)
    return squares


@compiled_in_any_order
def sum_of_squares(x: Array) -> float:
    """The sum of the squares, by rows in float32, of all in float64."""
    total = 0.0
    for row in range(x.shape[0]):
        in_row = _ZERO
        for c in range(x.shape[1]):
            number = get(x, row, c)
            in_row += number * number
        total += np.float64(in_row)
    return total


@compiled
def accumulate(part: Array, total: Floats) -> None:
    """total += part."""
    for row in range(total.shape[0]):
        for c in range(total.shape[1]):
            total[row, c] += get(part, row, c)
