"""One token for each of N sequences through all layers: what `Decoder.step` does, in loops.

With tensor operations most of a step's time is the overhead of many small ones. Here a thread takes some sequences
through all layers, waiting for nobody: a weight that was read serves all of them, those of an expert all who chose it,
and what is computed stays in the nearest cache.

Shape letters: N sequences, of which a thread has room for as many as fill whole quads, G those of one expert, R rows of
the cache, L layers (D of them dense, M mixtures), C channels, H heads, B positions, E experts and S shared ones,
F hidden channels of an expert, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.kernels import Array, compiled, compiled_parallel, use_threads
from nanomoe.model.moe import SATURATED

_QUAD = 4
"""Rows that a product computes together: eight sums, with two outputs, for six numbers read."""

_MOST_ROWS = 8
"""Sequences that are taken through the layers together: what they need for a product stays in a core's nearest cache.
"""

_ONE = np.float32(1)
_HALF = np.float32(0.5)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_EPSILON = np.float32(1e-5)

# The coefficients of Eigen's erf for float32 (`generic_fast_erf`): odd powers above, even ones below, within +-4.
_FOUR = np.float32(4)
_A1, _A3, _A5, _A7, _A9, _A11, _A13 = map(np.float32, (
    -1.60960333262415e-02, -2.95459980854025e-03, -7.34990630326855e-04, -5.69250639462346e-05,
    -2.10102402082508e-06, 2.77068142495902e-08, -2.72614225801306e-10,
))  # fmt: skip
_B0, _B2, _B4, _B6, _B8 = map(np.float32, (
    -1.42647390514189e-02, -7.37332916720468e-03, -1.68282697438203e-03, -2.13374055278905e-04, -1.45660718464996e-05,
))  # fmt: skip


class Weights(NamedTuple):
    """A model's weights, of all layers of a kind together. Products are laid out (out, in)."""

    wte: Array  # (V, C)
    wpe: Array  # (B, C)
    ln_1: Array  # (L, 2, C): weight and bias
    attn: Array  # (L, 3C, C), grouped by head: query, key and value of head 0, then of head 1
    attn_bias: Array  # (L, 3C)
    attn_out: Array  # (L, C, C)
    attn_out_bias: Array  # (L, C)
    ln_2: Array  # (L, 2, C)
    mlp_in: Array  # (D, 4C, C)
    mlp_in_bias: Array  # (D, 4C)
    mlp_out: Array  # (D, C, 4C)
    mlp_out_bias: Array  # (D, C)
    router: Array  # (M, E, C)
    balance_bias: Array  # (M, E)
    expert_in: Array  # (M, E + S, F, C), the shared ones last
    expert_in_bias: Array  # (M, E + S, F)
    expert_out: Array  # (M, E + S, C, F)
    expert_out_bias: Array  # (M, E + S, C)
    ln_f: Array  # (2, C)
    place: npt.NDArray[np.int64]  # (L,): its place among the dense layers, or -1 minus that among the mixtures


class Routing(NamedTuple):
    """How a mixture chooses."""

    k: int
    sigmoid: bool
    renormalises: bool
    saturated: float
    """Larger logits count as equal."""

    biased: bool
    """Whether experts are chosen by score plus balance bias, not by logit."""

    error: float
    """Bound on the error of what they are chosen by."""


class Loops:
    """A model whose steps are done in loops."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        """`weights`: by nanoGPT's names, float32, on the CPU."""
        self._weights = _stack(weights, config)
        self._config = config
        self._biased = any(name.endswith("balance_bias") for name in weights)

    @property
    def n_bytes(self) -> int:
        """Memory beside the embeddings, which are the caller's."""
        return sum(array.nbytes for array in self._weights[2:])

    def step(
        self, tokens: Sequence[int], positions: Sequence[int], cache: Tensor, router_error: float
    ) -> tuple[Tensor, list[bool]]:
        """Append one token to each of the cached rows 0 to N - 1.

        Args:
            tokens: the token of each row.
            positions: its position.
            cache: (L, R * H, B, 2 C / H), contiguous: keys and values side by side.
            router_error: bound on the error of what experts are chosen by.

        Returns:
            The hidden states (N, C) after the last norm, and for each row whether this token's routing is certain.
        """
        config = self._config
        routing = Routing(
            k=config.k,
            sigmoid=config.router_score == "sigmoid",
            renormalises=config.renormalises_gates,
            saturated=SATURATED if config.router_score == "sigmoid" else math.inf,
            biased=self._biased,
            error=router_error,
        )
        hidden_NC = np.empty((len(tokens), config.n_embd), np.float32)
        certain_N = np.empty(len(tokens), np.bool_)
        L, _, B, width = cache.shape
        cache_LRHBD = cache.numpy().reshape(L, -1, config.n_head, B, width)
        arguments = np.array(tokens), np.array(positions), self._weights, routing, cache_LRHBD, hidden_NC, certain_N
        n_quads = -(-len(tokens) // _QUAD)
        _step(min(_MOST_ROWS, _QUAD * -(-n_quads // use_threads(len(tokens)))), *arguments)
        certain: list[bool] = certain_N.tolist()
        return torch.from_numpy(hidden_NC), certain


@compiled
def _dot(x, y):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@compiled
def _linear(x_NI, w_OI, b_O, y_NO, n):
    """y = x w + b for the first `n` rows. Unless that is one, whole quads are computed: there is room for them."""
    if n == 1:
        for o in range(len(w_OI)):
            y_NO[0, o] = _dot(x_NI[0], w_OI[o]) + b_O[o]
        return
    for o in range(0, len(w_OI), 2):
        p = min(o + 1, len(w_OI) - 1)  # the last output is computed twice if it is odd
        v_I, w_I = w_OI[o], w_OI[p]
        for row in range(0, n, _QUAD):
            x_0, x_1, x_2, x_3 = x_NI[row], x_NI[row + 1], x_NI[row + 2], x_NI[row + 3]
            v_0 = v_1 = v_2 = v_3 = w_0 = w_1 = w_2 = w_3 = np.float32(0)
            for i in range(len(w_I)):
                v_0 += x_0[i] * v_I[i]
                v_1 += x_1[i] * v_I[i]
                v_2 += x_2[i] * v_I[i]
                v_3 += x_3[i] * v_I[i]
                w_0 += x_0[i] * w_I[i]
                w_1 += x_1[i] * w_I[i]
                w_2 += x_2[i] * w_I[i]
                w_3 += x_3[i] * w_I[i]
            y_0, y_1, y_2, y_3 = y_NO[row], y_NO[row + 1], y_NO[row + 2], y_NO[row + 3]
            y_0[o], y_1[o], y_2[o], y_3[o] = v_0 + b_O[o], v_1 + b_O[o], v_2 + b_O[o], v_3 + b_O[o]
            y_0[p], y_1[p], y_2[p], y_3[p] = w_0 + b_O[p], w_1 + b_O[p], w_2 + b_O[p], w_3 + b_O[p]


@compiled
def _norm(x_C, weight_and_bias, y_C):
    C = np.float32(len(x_C))
    mean = np.float32(0)
    for c in range(len(x_C)):
        mean += x_C[c]
    mean /= C
    variance = np.float32(0)
    for c in range(len(x_C)):
        variance += (x_C[c] - mean) ** 2
    scale = _ONE / np.sqrt(variance / C + _EPSILON)
    weight_C, bias_C = weight_and_bias[0], weight_and_bias[1]
    for c in range(len(x_C)):
        y_C[c] = (x_C[c] - mean) * scale * weight_C[c] + bias_C[c]


@compiled
def _gelu(x):
    """GELU with the exact erf, as a quotient of polynomials: the library's erf is ten times slower in a loop."""
    for i in range(len(x)):
        z = min(max(x[i] * _SQRT_HALF, -_FOUR), _FOUR)
        z_2 = z * z
        above = ((((((_A13 * z_2 + _A11) * z_2 + _A9) * z_2 + _A7) * z_2 + _A5) * z_2 + _A3) * z_2 + _A1) * z
        below = (((_B8 * z_2 + _B6) * z_2 + _B4) * z_2 + _B2) * z_2 + _B0
        x[i] = _HALF * x[i] * (_ONE + above / below)


@compiled
def _attend(qkv, position, cache_HBD, scores_B, y_C):
    """One token's attention, after its key and value were put into the cache of its row."""
    H, _, width = cache_HBD.shape
    D = width // 2
    scale = _ONE / np.sqrt(np.float32(D))
    for head in range(H):
        cached_BD = cache_HBD[head]
        new = qkv[head * 3 * D : (head + 1) * 3 * D]
        query, newest = new[:D], cached_BD[position]
        for d in range(2 * D):
            newest[d] = new[D + d]
        largest = np.float32(-np.inf)
        for at in range(position + 1):
            scores_B[at] = _dot(query, cached_BD[at, :D]) * scale
            largest = max(largest, scores_B[at])
        total = np.float32(0)
        for at in range(position + 1):
            scores_B[at] = np.exp(scores_B[at] - largest)
            total += scores_B[at]
        y_D = y_C[head * D : (head + 1) * D]
        y_D[:] = 0
        for at in range(position + 1):
            share, value_D = scores_B[at] / total, cached_BD[at, D:]
            for d in range(D):
                y_D[d] += share * value_D[d]


@compiled
def _route(x_C, router_EC, bias_E, routing, chosen_K, gates_K):
    """Choose one token's experts and their gates; whether the choice is certain."""
    E = len(router_EC)
    wanted_E, scores_E = np.empty(E, np.float32), np.empty(E, np.float32)
    for e in range(E):
        wanted_E[e] = _dot(x_C, router_EC[e])
    if routing.sigmoid:
        for e in range(E):
            scores_E[e] = _ONE / (_ONE + np.exp(-wanted_E[e]))
    else:
        largest = wanted_E.max()
        total = np.float32(0)
        for e in range(E):
            scores_E[e] = np.exp(wanted_E[e] - largest)
            total += scores_E[e]
        for e in range(E):
            scores_E[e] /= total
    for e in range(E):
        wanted_E[e] = scores_E[e] + bias_E[e] if routing.biased else min(wanted_E[e], routing.saturated)
    last = total = np.float32(0)
    for slot in range(routing.k):  # the largest, the first of equals
        best = 0
        for e in range(1, E):
            if wanted_E[e] > wanted_E[best]:
                best = e
        chosen_K[slot], gates_K[slot], last = best, scores_E[best], wanted_E[best]
        total += scores_E[best]
        wanted_E[best] = -np.inf
    if routing.renormalises:
        for slot in range(routing.k):
            gates_K[slot] /= total
    return routing.k == E or last - wanted_E.max() > 2 * routing.error


@compiled
def _mix(x_NC, n, mixture, weights, routing, certain_N, y_NC):
    """y = the gated sum of its experts, for each of the first `n` rows; a row whose choice is not certain is no longer
    so in `certain_N`."""
    n_routed = weights.router.shape[1]
    _, n_experts, F, C = weights.expert_in.shape
    chosen_NK, gates_NK = np.empty((n, routing.k), np.int64), np.empty((n, routing.k), np.float32)
    for row in range(n):
        certain_N[row] &= _route(
            x_NC[row], weights.router[mixture], weights.balance_bias[mixture], routing, chosen_NK[row], gates_NK[row]
        )
        y_NC[row] = 0
    rows_G, gates_G = np.empty(n, np.int64), np.empty(n, np.float32)
    x_GC, out_GC, hidden_GF = np.zeros_like(x_NC), np.empty_like(x_NC), np.empty((len(x_NC), F), np.float32)
    for expert in range(n_experts):
        g = 0
        for row in range(n):
            gate = _ONE if expert >= n_routed else np.float32(0)  # shared experts serve everybody
            for slot in range(routing.k):
                if chosen_NK[row, slot] == expert:
                    gate = gates_NK[row, slot]
            if gate != 0:
                rows_G[g], gates_G[g], x_GC[g] = row, gate, x_NC[row]
                g += 1
        if g:
            _linear(x_GC, weights.expert_in[mixture, expert], weights.expert_in_bias[mixture, expert], hidden_GF, g)
            for i in range(g):
                _gelu(hidden_GF[i])
            _linear(hidden_GF, weights.expert_out[mixture, expert], weights.expert_out_bias[mixture, expert], out_GC, g)
            for i in range(g):
                y_C, out_C, gate = y_NC[rows_G[i]], out_GC[i], gates_G[i]
                for c in range(C):
                    y_C[c] += gate * out_C[c]


@compiled
def _take_through(first, last, tokens, positions, weights, routing, cache_LRHBD, hidden_NC, certain_N):
    """Rows `first` to `last`, exclusive."""
    n = last - first
    room = (n + _QUAD - 1) // _QUAD * _QUAD
    L, _, _, B, _ = cache_LRHBD.shape
    C = weights.wte.shape[1]
    # Zeros, because rows that only fill a quad are computed as well.
    x = np.zeros((room, C), np.float32)
    y = np.zeros((room, C), np.float32)
    z = np.zeros((room, C), np.float32)
    qkv = np.zeros((room, 3 * C), np.float32)
    hidden = np.zeros((room, 4 * C), np.float32)
    scores_B = np.empty(B, np.float32)
    for row in range(n):
        x[row] = weights.wte[tokens[first + row]] + weights.wpe[positions[first + row]]
        certain_N[first + row] = True
    for layer in range(L):
        for row in range(n):
            _norm(x[row], weights.ln_1[layer], y[row])
        _linear(y, weights.attn[layer], weights.attn_bias[layer], qkv, n)
        for row in range(n):
            _attend(qkv[row], positions[first + row], cache_LRHBD[layer, first + row], scores_B, y[row])
        _linear(y, weights.attn_out[layer], weights.attn_out_bias[layer], z, n)
        for row in range(n):
            x[row] += z[row]
            _norm(x[row], weights.ln_2[layer], y[row])
        place = weights.place[layer]
        if place >= 0:
            _linear(y, weights.mlp_in[place], weights.mlp_in_bias[place], hidden, n)
            for row in range(n):
                _gelu(hidden[row])
            _linear(hidden, weights.mlp_out[place], weights.mlp_out_bias[place], z, n)
        else:
            _mix(y, n, -1 - place, weights, routing, certain_N[first:last], z)
        for row in range(n):
            x[row] += z[row]
    for row in range(n):
        _norm(x[row], weights.ln_f, hidden_NC[first + row])


@compiled_parallel
def _step(rows, tokens, positions, weights, routing, cache_LRHBD, hidden_NC, certain_N):
    for part in numba.prange((len(tokens) + rows - 1) // rows):
        first = part * rows
        last = min(first + rows, len(tokens))
        _take_through(first, last, tokens, positions, weights, routing, cache_LRHBD, hidden_NC, certain_N)


def _stack(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The weights as the loops read them, by nanoGPT's names, float32 on the CPU. All are copies but the embeddings."""
    C, S = config.n_embd, config.n_shared_experts
    moe = list(config.moe_layers)
    dense = [layer for layer in range(config.n_layer) if layer not in moe]
    order = torch.arange(3 * C).view(3, config.n_head, -1).transpose(0, 1).flatten()

    def of(layers: list[int], name: str, *shape: int) -> Array:
        """(layers, *shape); zeros where the model has no such parameter, or there is no such layer."""
        found = [weights.get(f"transformer.h.{layer}.{name}", torch.zeros(shape)) for layer in layers]
        return torch.stack(found).numpy() if found else np.zeros((0, *shape), np.float32)

    def norm(name: str) -> Array:
        return np.stack([of(every, f"{name}.weight", C), of(every, f"{name}.bias", C)], axis=1)

    def experts(name: str, *shape: int) -> Array:
        chosen, shared = of(moe, f"mlp.experts.{name}", E, *shape), of(moe, f"mlp.shared.{name}", S, *shape)
        return np.concatenate([chosen, shared], axis=1)

    every = list(range(config.n_layer))
    E, F = (config.n_experts, config.expert_hidden) if moe else (1, 1)
    ln_f_bias = weights.get("transformer.ln_f.bias", torch.zeros(C))
    return Weights(
        wte=weights["transformer.wte.weight"].numpy(),
        wpe=weights["transformer.wpe.weight"].numpy(),
        ln_1=norm("ln_1"),
        attn=np.ascontiguousarray(of(every, "attn.c_attn.weight", 3 * C, C)[:, order]),
        attn_bias=np.ascontiguousarray(of(every, "attn.c_attn.bias", 3 * C)[:, order]),
        attn_out=of(every, "attn.c_proj.weight", C, C),
        attn_out_bias=of(every, "attn.c_proj.bias", C),
        ln_2=norm("ln_2"),
        mlp_in=of(dense, "mlp.c_fc.weight", 4 * C, C),
        mlp_in_bias=of(dense, "mlp.c_fc.bias", 4 * C),
        mlp_out=of(dense, "mlp.c_proj.weight", C, 4 * C),
        mlp_out_bias=of(dense, "mlp.c_proj.bias", C),
        router=of(moe, "mlp.router.weight", E, C),
        balance_bias=of(moe, "mlp.router.balance_bias", E),
        expert_in=np.ascontiguousarray(experts("w_in", C, F).swapaxes(2, 3)),
        expert_in_bias=experts("b_in", F),
        expert_out=np.ascontiguousarray(experts("w_out", F, C).swapaxes(2, 3)),
        expert_out_bias=experts("b_out", C),
        ln_f=torch.stack([weights["transformer.ln_f.weight"], ln_f_bias]).numpy(),
        place=np.array([-1 - moe.index(layer) if layer in moe else dense.index(layer) for layer in every]),
    )
