"""The loops of a mixture's experts, there and back. An expert's rows lie one below the other; the experts one after
another: rows `starts[e]` to `starts[e + 1]` are those of expert e.

Shape letters beside those of this package: E experts, K experts per token, S shared experts, A rows of experts.
"""

import numpy as np

from nanomoe.compiling import Array, Floats
from nanomoe.training.steps.loops.compiling import Keys, compiled, compiled_in_any_order
from nanomoe.training.steps.loops.elements import get, kept, put
from nanomoe.training.steps.loops.routing import Integers

_ZERO = np.float32(0)


@compiled
def gather(first: int, end: int, x_NC: Array, tokens_A: Integers, rows_AC: Array) -> None:
    """Each row of the experts is its token's."""
    for row in range(first, end):
        token = tokens_A[row]
        for c in range(x_NC.shape[1]):
            rows_AC[row, c] = x_NC[token, c]


@compiled_in_any_order
def combine(
    first: int, end: int, T: int, out_AC: Array, bias_EC: Floats, chosen_NK: Integers, slots_NK: Integers,
    gates_NK: Floats, shared_AC: Array, shared_bias_SC: Floats, keys_BP2: Keys, cut: np.uint32, scale: np.float32,
    sum_NC: Array,
) -> None:  # fmt: skip
    """The sum over a token's chosen experts of gate * dropout(output + bias), and over the shared ones with gate 1.

    A token's j-th choice has the j-th plane of the dropout; the shared experts have the next ones.
    """
    N, C = sum_NC.shape
    K, S = chosen_NK.shape[1], len(shared_bias_SC)
    sum_C = np.empty(C, np.float32)
    for row in range(first, end):
        b, t = row // T, row % T
        for c in range(C):
            sum_C[c] = _ZERO
        for j in range(K):
            slot, expert, gate = slots_NK[row, j], chosen_NK[row, j], gates_NK[row, j]
            if slot >= 0:
                low, high = keys_BP2[b, j, 0], keys_BP2[b, j, 1]
                for c in range(C):
                    out = get(out_AC, slot, c) + bias_EC[expert, c]
                    sum_C[c] += gate * out * kept(low, high, t, c, cut, scale)
        for s in range(S):
            low, high = keys_BP2[b, K + s, 0], keys_BP2[b, K + s, 1]
            for c in range(C):
                out = get(shared_AC, s * N + row, c) + shared_bias_SC[s, c]
                sum_C[c] += out * kept(low, high, t, c, cut, scale)
        for c in range(C):
            put(sum_NC, row, c, sum_C[c])


@compiled_in_any_order
def combine_backward(
    first: int, end: int, T: int, d_sum_NC: Array, out_AC: Array, bias_EC: Floats, d_bias_EC: Floats,
    chosen_NK: Integers, slots_NK: Integers, gates_NK: Floats, d_gates_NK: Floats, shared_AC: Array,
    d_shared_bias_SC: Floats, keys_BP2: Keys, cut: np.uint32, scale: np.float32,
) -> None:  # fmt: skip
    """Through `combine`: outputs become their gradients in place. A dropped assignment's gate has a gradient of 0."""
    N, C = d_sum_NC.shape
    K, S = chosen_NK.shape[1], len(d_shared_bias_SC)
    for row in range(first, end):
        b, t = row // T, row % T
        for j in range(K):
            slot, expert, gate = slots_NK[row, j], chosen_NK[row, j], gates_NK[row, j]
            along = _ZERO
            if slot >= 0:
                low, high = keys_BP2[b, j, 0], keys_BP2[b, j, 1]
                for c in range(C):
                    d_kept = get(d_sum_NC, row, c) * kept(low, high, t, c, cut, scale)
                    along += d_kept * (get(out_AC, slot, c) + bias_EC[expert, c])
                    d_out = d_kept * gate
                    put(out_AC, slot, c, d_out)
                    d_bias_EC[expert, c] += d_out
            d_gates_NK[row, j] = along
        for s in range(S):
            low, high = keys_BP2[b, K + s, 0], keys_BP2[b, K + s, 1]
            for c in range(C):
                d_out = get(d_sum_NC, row, c) * kept(low, high, t, c, cut, scale)
                put(shared_AC, s * N + row, c, d_out)
                d_shared_bias_SC[s, c] += d_out


@compiled
def scatter(
    first: int, end: int, d_rows_AC: Array, slots_NK: Integers, d_shared_AC: Array, d_router_NC: Floats, d_x_NC: Array
) -> None:
    """Each token's gradient: the router's, those of its rows, and those of the shared experts."""
    N, C = d_x_NC.shape
    S = len(d_shared_AC) // N
    sum_C = np.empty(C, np.float32)
    for row in range(first, end):
        for c in range(C):
            sum_C[c] = d_router_NC[row, c]
        for j in range(slots_NK.shape[1]):
            slot = slots_NK[row, j]
            if slot >= 0:
                for c in range(C):
                    sum_C[c] += get(d_rows_AC, slot, c)
        for s in range(S):
            for c in range(C):
                sum_C[c] += get(d_shared_AC, s * N + row, c)
        for c in range(C):
            put(d_x_NC, row, c, sum_C[c])
