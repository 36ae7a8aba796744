"""The loops of a forward pass of which no way back follows: no dropout, and nothing is kept. All in float32.

Those of the way there that have neither are taken from `forward`, `routing` and `expert_rows`.
"""

import numpy as np

from nanomoe.compiling import Array, Floats
from nanomoe.training.steps.loops.compiling import compiled, compiled_in_any_order
from nanomoe.training.steps.loops.elements import exp, normal_cdf, ordered, unordered
from nanomoe.training.steps.loops.routing import Integers

_ONE = np.float32(1)
_ZERO = np.float32(0)
_EPSILON = np.float32(1e-5)


@compiled_in_any_order
def _norm_row(row: int, x_NC: Floats, weight_C: Floats, bias_C: Floats, out_NC: Floats) -> None:
    """Layer normalisation of one row."""
    C = x_NC.shape[1]
    total = _ZERO
    for c in range(C):
        total += x_NC[row, c]
    mean = np.float32(total / np.float32(C))
    squares = _ZERO
    for c in range(C):
        centred = x_NC[row, c] - mean
        squares += centred * centred
    scale = np.float32(_ONE / np.sqrt(np.float32(squares / np.float32(C)) + _EPSILON))
    for c in range(C):
        out_NC[row, c] = (x_NC[row, c] - mean) * scale * weight_C[c] + bias_C[c]


@compiled_in_any_order
def embed(
    tokens_BT: Array, wte_VC: Floats, wpe_TC: Floats, x_NC: Floats, weight_C: Floats, bias_C: Floats, out_NC: Floats
) -> None:
    """x = token + position; out = norm(x)."""
    B, T = tokens_BT.shape
    for b in range(B):
        for t in range(T):
            row, token = b * T + t, tokens_BT[b, t]
            for c in range(x_NC.shape[1]):
                x_NC[row, c] = wte_VC[token, c] + wpe_TC[t, c]
            _norm_row(row, x_NC, weight_C, bias_C, out_NC)


@compiled_in_any_order
def add_branch(
    x_NC: Floats, branch_NC: Floats, branch_bias_C: Floats, weight_C: Floats, bias_C: Floats, out_NC: Floats
) -> None:
    """Add a branch and its bias to x; out = norm(x)."""
    for row in range(len(x_NC)):
        for c in range(x_NC.shape[1]):
            x_NC[row, c] += branch_NC[row, c] + branch_bias_C[c]
        _norm_row(row, x_NC, weight_C, bias_C, out_NC)


@compiled_in_any_order
def attend(factor: np.float32, scores_RT: Floats) -> None:
    """Causal softmax of `factor` times the scores, in place."""
    R, T = scores_RT.shape
    for row in range(R):
        end = row % T + 1
        key = ordered(scores_RT[row, 0])
        for past in range(1, end):
            key = max(key, ordered(scores_RT[row, past]))
        largest, total = unordered(key), _ZERO
        for past in range(end):
            weight = exp((scores_RT[row, past] - largest) * factor)
            scores_RT[row, past] = weight
            total += weight
        share = np.float32(_ONE / total)
        for past in range(end):
            scores_RT[row, past] *= share
        for later in range(end, T):
            scores_RT[row, later] = _ZERO


@compiled
def gelu(u_NF: Floats, bias_F: Floats) -> None:
    """GELU of u plus a bias, in place."""
    N, F = u_NF.shape
    for row in range(N):
        for f in range(F):
            u = u_NF[row, f] + bias_F[f]
            u_NF[row, f] = u * normal_cdf(u)


@compiled_in_any_order
def combine(
    out_AC: Floats, bias_EC: Floats, chosen_NK: Integers, slots_NK: Integers, gates_NK: Floats, shared_AC: Floats,
    shared_bias_SC: Floats, without: int, sum_NC: Floats,
) -> None:  # fmt: skip
    """The sum over a token's chosen experts, but `without` (-1 for none), of gate * (output + bias), and over the
    shared ones with gate 1."""
    N, C = sum_NC.shape
    for row in range(N):
        for c in range(C):
            sum_NC[row, c] = _ZERO
        for j in range(chosen_NK.shape[1]):
            slot, expert, gate = slots_NK[row, j], chosen_NK[row, j], gates_NK[row, j]
            if expert != without:
                for c in range(C):
                    sum_NC[row, c] += gate * (out_AC[slot, c] + bias_EC[expert, c])
        for s in range(len(shared_bias_SC)):
            for c in range(C):
                sum_NC[row, c] += shared_AC[s * N + row, c] + shared_bias_SC[s, c]


@compiled_in_any_order
def softmax_so_far(
    logits_NW: Floats, first: int, targets_N: Integers, largest_N: Floats, total_N: Floats, wanted_N: Floats,
    predicted_N: Integers,
) -> None:  # fmt: skip
    """Take into account the logits of the W entries of the vocabulary from `first` on.

    Per row: the largest logit so far, -inf before the first part; the sum of exponentials less it, 0 before; the
    target's logit; and the lowest entry that has the largest.
    """
    N, W = logits_NW.shape
    for row in range(N):
        key = ordered(logits_NW[row, 0])
        for w in range(1, W):
            key = max(key, ordered(logits_NW[row, w]))
        before = largest_N[row]
        if key > ordered(before):
            largest_N[row] = unordered(key)
            total_N[row] *= exp(before - largest_N[row])
            for w in range(W):
                if ordered(logits_NW[row, w]) == key:
                    predicted_N[row] = first + w
                    break
        largest, total = largest_N[row], _ZERO
        for w in range(W):
            total += exp(logits_NW[row, w] - largest)
        total_N[row] += total
        target = targets_N[row] - first
        if 0 <= target < W:
            wanted_N[row] = logits_NW[row, target]
