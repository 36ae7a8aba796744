"""From 8-bit products to the likeliest token: what `OutputLayer.likeliest` does, in loops.

A row's products are read where the largest of a group of tokens is close enough to the best. Only for the few tokens
that are, the embedding is read in float32.

Shape letters: N rows, V vocabulary, C channels, G groups, T tokens of a group.
"""

import numba
import numpy as np
import numpy.typing as npt

from nanomoe.int8 import LEAST
from nanomoe.kernels import Array, compiled, compiled_parallel, use_threads
from nanomoe.kernels.products import GROUP, Ints, Products, read_group

Ids = npt.NDArray[np.int64]
Wide = npt.NDArray[np.float64]

_LEAST = np.float32(LEAST)


def quantize(x_NC: Array) -> tuple[Ints, Wide, Wide, Wide]:
    """Rows in 8-bit integers, the unit of each row, its Euclidean norm, and that of what rounding changed."""
    ints_NC = np.empty(x_NC.shape, np.int8)
    units_N, norms_N, roundings_N = np.empty(len(x_NC)), np.empty(len(x_NC)), np.empty(len(x_NC))
    _quantize(x_NC, ints_NC, units_N, norms_N, roundings_N)
    return ints_NC, units_N, norms_N, roundings_N


def likeliest(products: Products, slack_N: Wide, gap_N: Wide, x_NC: Array, wte_VC: Array) -> list[int | None]:
    """The likeliest token of each row; None where another is too close.

    Args:
        products: of the rows' integers with the embedding's.
        slack_N: how far below the best, in products, a token can still be the best one.
        gap_N: how far, in logits, the best must be above all others.
    """
    tokens_N = np.empty(len(x_NC), np.int64)
    use_threads(len(x_NC))
    _likeliest(products, slack_N, gap_N, x_NC, wte_VC, tokens_N)
    return [None if token < 0 else token for token in tokens_N.tolist()]


@compiled
def _quantize(x_NC, ints_NC, units_N, norms_N, roundings_N):
    for n in range(len(x_NC)):
        x_C = x_NC[n]
        largest, squares, error_squares = _LEAST, np.float32(0), np.float32(0)
        for c in range(len(x_C)):
            largest = max(largest, abs(x_C[c]))
            squares += x_C[c] * x_C[c]
        unit = largest / np.float32(127)
        for c in range(len(x_C)):
            rounded = np.rint(x_C[c] / unit)
            ints_NC[n, c] = np.int8(rounded)
            error_squares += (x_C[c] - rounded * unit) ** 2
        units_N[n], norms_N[n], roundings_N[n] = unit, np.sqrt(squares), np.sqrt(error_squares)


@compiled
def float32_logit(x_C, w_C):
    """The product of a hidden state with a token's embedding."""
    total = np.float32(0)
    for c in range(len(x_C)):
        total += x_C[c] * w_C[c]
    return total


@compiled
def _likeliest_of(products, n, slack, gap, x_C, wte_VC):
    largest_G, out_1T = products.largest[n], np.empty((1, GROUP), np.int32)
    least = largest_G.max() - slack
    best, best_logit, runner_up = -1, np.float32(-np.inf), np.float32(-np.inf)
    for g in range(len(largest_G)):
        if largest_G[g] >= least:
            read_group(products, n, g, out_1T)
            for t in range(GROUP):
                if out_1T[0, t] >= least and g * GROUP + t < len(wte_VC):
                    logit = float32_logit(x_C, wte_VC[g * GROUP + t])
                    if logit > best_logit:
                        best, best_logit, runner_up = g * GROUP + t, logit, best_logit
                    elif logit > runner_up:
                        runner_up = logit
    return best if best_logit - runner_up > gap else -1


@compiled_parallel
def _likeliest(products, slack_N, gap_N, x_NC, wte_VC, tokens_N):
    for n in numba.prange(len(x_NC)):
        tokens_N[n] = _likeliest_of(products, n, slack_N[n], gap_N[n], x_NC[n], wte_VC)
