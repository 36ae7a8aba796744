"""The loops of the backward pass. `d_x` is the loss's gradient with respect to `x`; those of weights are added to."""

import numpy as np

from nanomoe.compiling import Array, Floats
from nanomoe.training.steps.loops.compiling import Keys, compiled, compiled_in_any_order
from nanomoe.training.steps.loops.elements import get, kept, put

_ZERO = np.float32(0)


@compiled_in_any_order
def norm_backward(
    first: int, end: int, T: int, d_out_NC: Array, factor_N: Floats,
    x_NC: Floats, mean_N: Floats, scale_N: Floats, weight_C: Floats, d_weight_C: Floats, d_bias_C: Floats,
    d_x_NC: Floats,
    keys_BP2: Keys, cut: np.uint32, scale: np.float32, d_branch_NC: Array, d_branch_bias_C: Floats,
) -> None:  # fmt: skip
    """Through out = norm(x), row i of d_out times factor i, onto d_x; then through the dropout of the branch that was
    added to make x, and through that branch's bias."""
    C = x_NC.shape[1]
    for row in range(first, end):
        b, t = row // T, row % T
        low, high = keys_BP2[b, 0, 0], keys_BP2[b, 0, 1]
        mean, inverse, factor = mean_N[row], scale_N[row], factor_N[row]
        total, along = _ZERO, _ZERO
        for c in range(C):
            d_out = get(d_out_NC, row, c) * factor
            normal = (x_NC[row, c] - mean) * inverse
            d_weight_C[c] += d_out * normal
            d_bias_C[c] += d_out
            d_normal = d_out * weight_C[c]
            total += d_normal
            along += d_normal * normal
        total = np.float32(total / np.float32(C))
        along = np.float32(along / np.float32(C))
        for c in range(C):
            normal = (x_NC[row, c] - mean) * inverse
            d_normal = get(d_out_NC, row, c) * factor * weight_C[c]
            d_x_NC[row, c] += inverse * (d_normal - total - normal * along)
        for c in range(C):
            d_branch = d_x_NC[row, c] * kept(low, high, t, c, cut, scale)
            put(d_branch_NC, row, c, d_branch)
            d_branch_bias_C[c] += d_branch


@compiled
def gelu_backward(first: int, end: int, d_NF: Array, slope_NF: Array, d_bias_F: Floats) -> None:
    """Through GELU, in place, and through the bias before it."""
    F = d_NF.shape[1]
    for row in range(first, end):
        for f in range(F):
            d_u = get(d_NF, row, f) * get(slope_NF, row, f)
            put(d_NF, row, f, d_u)
            d_bias_F[f] += d_u


@compiled_in_any_order
def attend_backward(
    first: int, end: int, H: int, factor: np.float32, d_dropped: Array, weights: Floats, keys_BP2: Keys, cut: np.uint32,
    scale: np.float32, d_scores: Array, dropped: Array,
) -> None:  # fmt: skip
    """Through the dropout and the softmax of `attend`, of the heads from `first` on; the dropped weights are made once
    more."""
    T = weights.shape[1]
    d_weights = np.empty(T, np.float32)
    for head in range(first, end):
        b, h = head // H, head % H
        low, high = keys_BP2[b, h, 0], keys_BP2[b, h, 1]
        for t in range(T):
            row = head * T + t
            along = _ZERO
            for past in range(t + 1):
                keep = kept(low, high, t, past, cut, scale)
                weight = weights[row, past]
                put(dropped, row, past, weight * keep)
                d_weight = get(d_dropped, row, past) * keep
                d_weights[past] = d_weight
                along += d_weight * weight
            for past in range(t + 1):
                put(d_scores, row, past, weights[row, past] * (d_weights[past] - along) * factor)


@compiled
def join_heads(
    first: int, end: int, T: int, H: int, d_queries: Array, d_keys: Array, d_values: Array, d_qkv: Array, d_bias: Floats
) -> None:
    """From the gradients of queries, keys and values (B * H * T, D) to that of (N, 3C), and through its bias."""
    D = d_queries.shape[1]
    C = H * D
    for row in range(first, end):
        b, t = row // T, row % T
        for h in range(H):
            place, c = (b * H + h) * T + t, h * D
            for d in range(D):
                d_qkv[row, c + d] = d_queries[place, d]
            for d in range(D):
                d_qkv[row, C + c + d] = d_keys[place, d]
            for d in range(D):
                d_qkv[row, 2 * C + c + d] = d_values[place, d]
        for c in range(3 * C):
            d_bias[c] += get(d_qkv, row, c)


@compiled
def embed_backward(first: int, end: int, tokens_BT: Array, d_NC: Floats, d_wte_VC: Array, d_wpe_TC: Floats) -> None:
    """Onto the gradients of the tokens' rows, and of the positions', in the channels from `first` on: each is one
    thread's, where two rows of a thread each might have the same token."""
    B, T = tokens_BT.shape
    for b in range(B):
        for t in range(T):
            row, token = b * T + t, tokens_BT[b, t]
            for c in range(first, end):
                put(d_wte_VC, token, c, get(d_wte_VC, token, c) + d_NC[row, c])
                d_wpe_TC[t, c] += d_NC[row, c]
