"""The loops of the forward pass. Activations are float32, or bfloat16 as its bits where products are in bfloat16."""

import numpy as np

from nanomoe.compiling import Array, Floats
from nanomoe.training.steps.loops.compiling import Keys, compiled, compiled_in_any_order
from nanomoe.training.steps.loops.elements import exp, get, kept, normal_cdf, normal_density, ordered, put, unordered

_ONE = np.float32(1)
_ZERO = np.float32(0)
_EPSILON = np.float32(1e-5)


@compiled
def _largest(row: int, x: Array, end: int) -> np.float32:
    """The largest of a row's first numbers; NaN if it is among them."""
    largest = ordered(get(x, row, 0))
    for c in range(1, end):
        largest = max(largest, ordered(get(x, row, c)))
    return unordered(largest)


@compiled_in_any_order
def _norm_row(
    row: int, x_NC: Floats, weight_C: Floats, bias_C: Floats, out_NC: Array, mean_N: Floats, scale_N: Floats
) -> None:
    """Layer normalisation of one row; its mean, and one over its standard deviation, are kept for the way back."""
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
        put(out_NC, row, c, (x_NC[row, c] - mean) * scale * weight_C[c] + bias_C[c])
    mean_N[row] = mean
    scale_N[row] = scale


@compiled_in_any_order
def embed(
    first: int, end: int, tokens_BT: Array, wte_VC: Floats, wpe_TC: Floats, keys_BP2: Keys, cut: np.uint32,
    scale: np.float32, x_NC: Floats, weight_C: Floats, bias_C: Floats, out_NC: Array, mean_N: Floats, scale_N: Floats,
) -> None:  # fmt: skip
    """x = dropout(token + position); out = norm(x)."""
    T = tokens_BT.shape[1]
    for row in range(first, end):
        b, t = row // T, row % T
        low, high = keys_BP2[b, 0, 0], keys_BP2[b, 0, 1]
        token = tokens_BT[b, t]
        for c in range(x_NC.shape[1]):
            x_NC[row, c] = (wte_VC[token, c] + wpe_TC[t, c]) * kept(low, high, t, c, cut, scale)
        _norm_row(row, x_NC, weight_C, bias_C, out_NC, mean_N, scale_N)


@compiled_in_any_order
def add_branch(
    first: int, end: int, T: int, x_NC: Floats, branch_NC: Array, branch_bias_C: Floats, keys_BP2: Keys, cut: np.uint32,
    scale: np.float32, sum_NC: Floats, weight_C: Floats, bias_C: Floats, out_NC: Array, mean_N: Floats, scale_N: Floats,
) -> None:  # fmt: skip
    """sum = x + dropout(branch + its bias); out = norm(sum)."""
    for row in range(first, end):
        b, t = row // T, row % T
        low, high = keys_BP2[b, 0, 0], keys_BP2[b, 0, 1]
        for c in range(x_NC.shape[1]):
            branch = get(branch_NC, row, c) + branch_bias_C[c]
            sum_NC[row, c] = x_NC[row, c] + branch * kept(low, high, t, c, cut, scale)
        _norm_row(row, sum_NC, weight_C, bias_C, out_NC, mean_N, scale_N)


@compiled
def split_heads(
    first: int, end: int, T: int, H: int, qkv: Array, bias: Floats, queries: Array, keys: Array, values: Array
) -> None:
    """From (N, 3C), a bias added, to queries, keys and values (B * H * T, D)."""
    D = queries.shape[1]
    C = H * D
    for row in range(first, end):
        b, t = row // T, row % T
        for h in range(H):
            place, c = (b * H + h) * T + t, h * D
            for d in range(D):
                put(queries, place, d, get(qkv, row, c + d) + bias[c + d])
            for d in range(D):
                put(keys, place, d, get(qkv, row, C + c + d) + bias[C + c + d])
            for d in range(D):
                put(values, place, d, get(qkv, row, 2 * C + c + d) + bias[2 * C + c + d])


@compiled
def to_heads(first: int, end: int, T: int, H: int, x_NC: Array, heads: Array) -> None:
    """From (N, C) to (B * H * T, D)."""
    D = heads.shape[1]
    for row in range(first, end):
        b, t = row // T, row % T
        for h in range(H):
            for d in range(D):
                heads[(b * H + h) * T + t, d] = x_NC[row, h * D + d]


@compiled
def from_heads(first: int, end: int, T: int, H: int, heads: Array, x_NC: Array) -> None:
    """From (B * H * T, D) to (N, C)."""
    D = heads.shape[1]
    for row in range(first, end):
        b, t = row // T, row % T
        for h in range(H):
            for d in range(D):
                x_NC[row, h * D + d] = heads[(b * H + h) * T + t, d]


@compiled_in_any_order
def attend(
    first: int, end: int, H: int, factor: np.float32, scores: Array, keys_BP2: Keys, cut: np.uint32, scale: np.float32,
    weights: Floats, dropped: Array,
) -> None:  # fmt: skip
    """Causal softmax of `factor` times the scores, all (B * H * T, T), and its dropout, of the heads from `first` on.
    What a token must not see is left alone: zeros since the arrays were made."""
    T = scores.shape[1]
    for head in range(first, end):
        b, h = head // H, head % H
        low, high = keys_BP2[b, h, 0], keys_BP2[b, h, 1]
        for t in range(T):
            row = head * T + t
            largest = _largest(row, scores, t + 1)
            total = _ZERO
            for past in range(t + 1):
                weight = exp((get(scores, row, past) - largest) * factor)
                weights[row, past] = weight
                total += weight
            share = np.float32(_ONE / total)
            for past in range(t + 1):
                weights[row, past] *= share
            for past in range(t + 1):
                put(dropped, row, past, weights[row, past] * kept(low, high, t, past, cut, scale))


@compiled
def gelu(first: int, end: int, u_NF: Array, bias_F: Floats, out_NF: Array, slope_NF: Array) -> None:
    """GELU of u plus a bias, and its derivative there."""
    F = u_NF.shape[1]
    # Widened and narrowed in loops of their own: the compiler makes no vectors of one that does everything.
    row_F, out_F, slope_F = np.empty(F, np.float32), np.empty(F, np.float32), np.empty(F, np.float32)
    for row in range(first, end):
        for f in range(F):
            row_F[f] = get(u_NF, row, f) + bias_F[f]
        for f in range(F):
            below = normal_cdf(row_F[f])
            out_F[f] = row_F[f] * below
            slope_F[f] = below + row_F[f] * normal_density(row_F[f])
        for f in range(F):
            put(out_NF, row, f, out_F[f])
        for f in range(F):
            put(slope_NF, row, f, slope_F[f])


@compiled_in_any_order
def cross_entropy(
    logits_NV: Array, targets_N: Array, share: np.float32, x_NC: Array, share_N: Floats, scaled_NC: Array
) -> float:
    """The loss times `share`, summed over the rows; ignored targets are negative.

    What it leaves for the way back, per row: in place of the logits exponentials, the target's less their sum, which
    are the logits' gradient but for a factor; that factor in `share_N`; and x times it in `scaled_NC`.
    """
    N, V = logits_NV.shape
    exponentials = np.empty(V, np.float32)
    loss = 0.0
    for row in range(N):
        largest = _largest(row, logits_NV, V)
        target = targets_N[row]
        wanted = get(logits_NV, row, max(0, target))
        total = _ZERO
        for v in range(V):
            exponential = exp(get(logits_NV, row, v) - largest)
            exponentials[v] = exponential
            total += exponential
        for v in range(V):
            put(logits_NV, row, v, exponentials[v])
        factor = _ZERO
        if target >= 0:
            loss += np.float64(np.float32(np.log(total)) - (wanted - largest))
            factor = np.float32(share / total)
            put(logits_NV, row, target, exponentials[target] - total)
        share_N[row] = factor
        for c in range(x_NC.shape[1]):
            put(scaled_NC, row, c, get(x_NC, row, c) * factor)
    return loss * np.float64(share)
