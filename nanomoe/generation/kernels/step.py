"""Tokens of several sequences through all layers, in loops.

With tensor operations most of a step's time is the overhead of many small ones. Here a thread takes some tokens through
all layers, waiting for nobody: a weight that was read serves all of them, those of an expert all who chose it, and what
is computed stays in the nearest cache.

A layer first puts the keys and values of all its tokens into the cache, then lets each attend up to its own position.
So the tokens may be one of each of many sequences or many of one, and a token's arithmetic is the same bits in either
case: products have one order of sums (`panels`), everything else is done token by token.

Shape letters: N tokens, R rows of the cache, L layers (D of them dense, M mixtures), C channels, H heads, W channels of
a head, B positions, E experts and S shared ones, F hidden channels of an expert, V vocabulary, P panels, l their lanes.
A width with a tick is filled up to whole panels.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanomoe.compiling import Floats, in_parts
from nanomoe.config import ModelConfig
from nanomoe.float32_functions import ERF_EVEN, ERF_ODD, EXP_POWERS, LN_2_HIGH, LN_2_LOW
from nanomoe.generation.kernels.compiling import compiled, compiled_in_any_order
from nanomoe.generation.kernels.panels import LANES, add_products, pack, padded

_TOGETHER = 16
"""Tokens that a thread takes through the layers together: what they need stays in a core's own caches."""

_ONE = np.float32(1)
_HALF = np.float32(0.5)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_EPSILON = np.float32(1e-5)

_FOUR = np.float32(4)
_A1, _A3, _A5, _A7, _A9, _A11, _A13 = ERF_ODD
_B0, _B2, _B4, _B6, _B8 = ERF_EVEN

_LEAST_EXPONENT = np.float32(-87)
_LOG2_E = np.float32(math.log2(math.e))
_E2, _E3, _E4, _E5, _E6, _E7 = EXP_POWERS


class Weights(NamedTuple):
    """A model's weights, of all layers of a kind together."""

    wte: Floats  # (V, C)
    wpe: Floats  # (B, C)
    ln_1: Floats  # (L, 2, C): weight and bias
    attn: Floats  # (L, P, C, l), outputs grouped by head: query, key and value of head 0, then of head 1
    attn_bias: Floats  # (L, 3C')
    attn_out: Floats  # (L, P, C, l)
    attn_out_bias: Floats  # (L, C')
    ln_2: Floats  # (L, 2, C)
    mlp_in: Floats  # (D, P, C, l)
    mlp_in_bias: Floats  # (D, 4C')
    mlp_out: Floats  # (D, P, 4C, l)
    mlp_out_bias: Floats  # (D, C')
    router: Floats  # (M, P, C, l)
    balance_bias: Floats  # (M, E)
    expert_in: Floats  # (M, E + S, P, C, l), the shared ones last
    expert_in_bias: Floats  # (M, E + S, F')
    expert_out: Floats  # (M, E + S, P, F, l)
    expert_out_bias: Floats  # (M, E + S, C')
    ln_f: Floats  # (2, C)
    place: npt.NDArray[np.int64]  # (L,): its place among the dense layers, or -1 minus that among the mixtures


class RouterOptions(NamedTuple):
    """How a mixture chooses its experts."""

    k: int
    sigmoid: bool
    renormalises: bool


class Cache(NamedTuple):
    """What earlier tokens left for later ones."""

    keys: Floats
    """(L, R, H, B' / l, W, l): panels whose outputs are positions."""

    values: Floats
    """(L, R, H, W' / l, B, l): panels whose inputs are positions."""


class Loops:
    """A model whose steps are done in loops."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        """`weights`: by nanoGPT's names, float32, on the CPU; a missing one is zero."""
        self._config = config
        self._weights = _stack(weights, config)
        self._router_options = RouterOptions(config.k, config.router_score == "sigmoid", config.renormalises_gates)
        self._cache = self._new_cache(0)

    @property
    def n_bytes(self) -> int:
        """Memory of the weights and the cache."""
        return sum(array.nbytes for array in (*self._weights, *self._cache))

    @property
    def row_bytes(self) -> int:
        """Memory of one cached sequence."""
        return sum(array.nbytes for array in self._new_cache(1))

    def _new_cache(self, n_rows: int) -> Cache:
        config = self._config
        L, H, B, W = config.n_layer, config.n_head, config.block_size, config.n_embd // config.n_head
        keys = np.zeros((L, n_rows, H, padded(B) // LANES, W, LANES), np.float32)
        return Cache(keys, np.zeros((L, n_rows, H, padded(W) // LANES, B, LANES), np.float32))

    def reserve(self, n_rows: int) -> None:
        """Make room for `n_rows` cached sequences; those that are cached stay."""
        before = self._cache.keys.shape[1]
        if n_rows > before:
            grown = self._new_cache(1 << (n_rows - 1).bit_length())
            for array, earlier in zip(grown, self._cache, strict=True):
                array[:, :before] = earlier
            self._cache = grown

    def step(self, spans: Sequence[tuple[int, int, Sequence[int]]]) -> Floats:
        """(N, C): the hidden state after the last norm of the last token of each span.

        Args:
            spans: a row of the cache, the position of the first token, and the tokens, which replace what the row
                held from there on. No row twice.
        """
        self.reserve(1 + max(row for row, _, _ in spans))
        lengths = [len(tokens) for _, _, tokens in spans]
        tokens_N = np.array([token for _, _, tokens in spans for token in tokens])
        positions_N = np.concatenate([np.arange(start, start + len(tokens)) for _, start, tokens in spans])
        rows_N = np.repeat([row for row, _, _ in spans], lengths)
        last_N = np.full(len(tokens_N), -1)
        ends = np.cumsum(lengths)
        last_N[ends - 1] = np.arange(len(spans))
        hidden_NC = np.empty((len(spans), self._config.n_embd), np.float32)
        arguments = tokens_N, positions_N, rows_N, last_N, self._weights, self._router_options, self._cache, hidden_NC
        in_parts(partial(_call, arguments), _bounds(ends, torch.get_num_threads()))
        return hidden_NC


def _call(arguments: tuple[object, ...], first: int, last: int) -> None:
    _forward_tokens(first, last, *arguments)


def _bounds(ends: npt.NDArray[np.int64], n_parts: int) -> list[int]:
    """Bounds of at most `n_parts` nearly equal parts, none of which ends within a span."""
    wanted = ends[-1] * np.arange(1, n_parts) / n_parts
    inner = ends[np.searchsorted(ends, wanted)]
    return [0, *sorted({*inner.tolist(), int(ends[-1])})]


@compiled
def _multiply(x_NI, n, w_PIL, bias_O, y_NO):
    """y = x w + b for the first `n` rows."""
    for row in range(n):
        for o in range(len(bias_O)):
            y_NO[row, o] = bias_O[o]
    add_products(x_NI, n, w_PIL, 0, len(w_PIL), w_PIL.shape[1], y_NO, 0)


@compiled_in_any_order
def _norm(x_C, weight_and_bias, y_C):
    C = weight_and_bias.shape[1]
    mean = np.float32(0)
    for c in range(C):
        mean += x_C[c]
    mean /= np.float32(C)
    variance = np.float32(0)
    for c in range(C):
        variance += (x_C[c] - mean) ** 2
    scale = _ONE / np.sqrt(variance / np.float32(C) + _EPSILON)
    weight_C, bias_C = weight_and_bias[0], weight_and_bias[1]
    for c in range(C):
        y_C[c] = (x_C[c] - mean) * scale * weight_C[c] + bias_C[c]


@compiled
def _add(x_C, z_C):
    for c in range(len(x_C)):
        x_C[c] += z_C[c]


@compiled_in_any_order
def _gelu(x):
    """GELU with the exact erf, as a quotient of polynomials: the library's erf is ten times slower in a loop."""
    for i in range(len(x)):
        z = min(max(x[i] * _SQRT_HALF, -_FOUR), _FOUR)
        z_2 = z * z
        above = ((((((_A13 * z_2 + _A11) * z_2 + _A9) * z_2 + _A7) * z_2 + _A5) * z_2 + _A3) * z_2 + _A1) * z
        below = (((_B8 * z_2 + _B6) * z_2 + _B4) * z_2 + _B2) * z_2 + _B0
        x[i] = _HALF * x[i] * (_ONE + above / below)


@compiled_in_any_order
def _softmax(scores, n, powers):
    """The first `n` numbers become shares that sum to 1; `powers` is scratch, int32.

    exp(x) = 2**k exp(r) with Cephes' polynomial (`expf`): the library's exp is several times slower in a loop.
    """
    largest = np.float32(-np.inf)
    for i in range(n):
        largest = max(largest, scores[i])
    for i in range(n):
        x = max(scores[i] - largest, _LEAST_EXPONENT)
        k = np.rint(x * _LOG2_E)
        powers[i] = (np.int32(k) + 127) << 23  # the bits of 2**k
        r = x - k * LN_2_HIGH - k * LN_2_LOW
        rest = ((((_E7 * r + _E6) * r + _E5) * r + _E4) * r + _E3) * r + _E2
        scores[i] = rest * r * r + r + _ONE
    total = np.float32(0)
    as_floats = powers.view(np.float32)
    for i in range(n):
        scores[i] *= as_floats[i]
        total += scores[i]
    for i in range(n):
        scores[i] /= total


@compiled
def _remember(qkv, position, keys_HPWl, values_HPBl):
    """Put a token's keys and values into its row of the cache."""
    H, _, W, _ = keys_HPWl.shape
    for head in range(H):
        key = (3 * head + 1) * W
        for w in range(W):
            keys_HPWl[head, position // LANES, w, position % LANES] = qkv[key + w]
            values_HPBl[head, w // LANES, position, w % LANES] = qkv[key + W + w]


@compiled
def _attend(qkv, position, keys_HPWl, values_HPBl, query_1W, scores_1B, powers_B, attended_1W, y_C):
    """One token's attention to the positions up to its own."""
    H, _, W, _ = keys_HPWl.shape
    scale = _ONE / np.sqrt(np.float32(W))
    for head in range(H):
        for w in range(W):
            query_1W[0, w] = qkv[3 * head * W + w] * scale
        n_panels = position // LANES + 1
        for i in range(n_panels * LANES):
            scores_1B[0, i] = 0
        add_products(query_1W, 1, keys_HPWl[head], 0, n_panels, W, scores_1B, 0)
        _softmax(scores_1B[0], position + 1, powers_B)
        for w in range(attended_1W.shape[1]):
            attended_1W[0, w] = 0
        add_products(scores_1B, 1, values_HPBl[head], 0, values_HPBl.shape[1], position + 1, attended_1W, 0)
        for w in range(W):
            y_C[head * W + w] = attended_1W[0, w]


@compiled
def _route(logits_E, bias_E, options, chosen_K, gates_K):
    """Choose one token's experts, those with the largest score plus balance bias, the first of equals; their gates."""
    E = len(bias_E)
    scores_E = logits_E[:E]
    if options.sigmoid:
        for e in range(E):
            scores_E[e] = _ONE / (_ONE + np.exp(-scores_E[e]))
    else:
        _softmax(scores_E, E, np.empty(E, np.int32))
    wanted_E = np.empty(E, np.float32)
    for e in range(E):
        wanted_E[e] = scores_E[e] + bias_E[e]
    total = np.float32(0)
    for slot in range(options.k):
        best = 0
        for e in range(1, E):
            if wanted_E[e] > wanted_E[best]:
                best = e
        chosen_K[slot], gates_K[slot] = best, scores_E[best]
        total += scores_E[best]
        wanted_E[best] = -np.inf
    if options.renormalises:
        for slot in range(options.k):
            gates_K[slot] /= total


@compiled
def _mix(x_NC, n, mixture, weights, options, y_NC):
    """y = the gated sum of its experts, for each of the first `n` rows."""
    n_routed = weights.balance_bias.shape[1]
    n_experts, width = weights.expert_in_bias.shape[1:]
    chosen_NK, gates_NK = np.empty((n, options.k), np.int64), np.empty((n, options.k), np.float32)
    logits_NE = np.zeros((n, weights.router.shape[1] * LANES), np.float32)
    add_products(x_NC, n, weights.router[mixture], 0, weights.router.shape[1], weights.router.shape[2], logits_NE, 0)
    for row in range(n):
        _route(logits_NE[row], weights.balance_bias[mixture], options, chosen_NK[row], gates_NK[row])
        for c in range(y_NC.shape[1]):
            y_NC[row, c] = 0
    rows_G, gates_G = np.empty(n, np.int64), np.empty(n, np.float32)
    x_GC, out_GC = np.empty(x_NC.shape, np.float32), np.empty(x_NC.shape, np.float32)
    hidden_GF = np.empty((n, width), np.float32)
    for expert in range(n_experts):
        g = 0
        for row in range(n):
            gate = _ONE if expert >= n_routed else np.float32(0)  # shared experts serve everybody
            for slot in range(options.k):
                if chosen_NK[row, slot] == expert:
                    gate = gates_NK[row, slot]
            if gate != 0:
                rows_G[g], gates_G[g] = row, gate
                for c in range(x_NC.shape[1]):
                    x_GC[g, c] = x_NC[row, c]
                g += 1
        if g:
            w_in, b_in = weights.expert_in[mixture, expert], weights.expert_in_bias[mixture, expert]
            w_out, b_out = weights.expert_out[mixture, expert], weights.expert_out_bias[mixture, expert]
            _multiply(x_GC, g, w_in, b_in, hidden_GF)
            for i in range(g):
                _gelu(hidden_GF[i])
            _multiply(hidden_GF, g, w_out, b_out, out_GC)
            for i in range(g):
                y_C, out_C, gate = y_NC[rows_G[i]], out_GC[i], gates_G[i]
                for c in range(len(y_C)):
                    y_C[c] += gate * out_C[c]


@compiled
def _forward_tokens(first, last, tokens, positions, rows, last_of, weights, options, cache, hidden_NC):
    """Tokens `first` to `last`, exclusive. A row's tokens come in the order of their positions."""
    C = weights.wte.shape[1]
    L, _, _, n_panels, W, _ = cache.keys.shape
    room = min(last - first, _TOGETHER)
    x = np.zeros((room, weights.attn_out_bias.shape[1]), np.float32)
    y, z = np.zeros(x.shape, np.float32), np.zeros(x.shape, np.float32)
    qkv = np.zeros((room, weights.attn_bias.shape[1]), np.float32)
    hidden = np.zeros((room, weights.mlp_in_bias.shape[1]), np.float32)
    query_1W, scores_1B = np.empty((1, W), np.float32), np.empty((1, n_panels * LANES), np.float32)
    powers_B = np.empty(n_panels * LANES, np.int32)
    attended_1W = np.empty((1, cache.values.shape[3] * LANES), np.float32)
    for begin in range(first, last, _TOGETHER):
        n = min(_TOGETHER, last - begin)
        for i in range(n):
            token, position = tokens[begin + i], positions[begin + i]
            for c in range(C):
                x[i, c] = weights.wte[token, c] + weights.wpe[position, c]
        for layer in range(L):
            keys, values = cache.keys[layer], cache.values[layer]
            for i in range(n):
                _norm(x[i], weights.ln_1[layer], y[i])
            _multiply(y, n, weights.attn[layer], weights.attn_bias[layer], qkv)
            for i in range(n):
                _remember(qkv[i], positions[begin + i], keys[rows[begin + i]], values[rows[begin + i]])
            for i in range(n):
                row = rows[begin + i]
                position = positions[begin + i]
                _attend(qkv[i], position, keys[row], values[row], query_1W, scores_1B, powers_B, attended_1W, y[i])
            _multiply(y, n, weights.attn_out[layer], weights.attn_out_bias[layer], z)
            for i in range(n):
                _add(x[i], z[i])
                _norm(x[i], weights.ln_2[layer], y[i])
            place = weights.place[layer]
            if place >= 0:
                _multiply(y, n, weights.mlp_in[place], weights.mlp_in_bias[place], hidden)
                for i in range(n):
                    _gelu(hidden[i])
                _multiply(hidden, n, weights.mlp_out[place], weights.mlp_out_bias[place], z)
            else:
                _mix(y, n, -1 - place, weights, options, z)
            for i in range(n):
                _add(x[i], z[i])
        for i in range(n):
            if last_of[begin + i] >= 0:
                _norm(x[i], weights.ln_f, hidden_NC[last_of[begin + i]])


def _stack(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The weights as the loops read them, by nanoGPT's names, float32 on the CPU. All are copies but the embeddings."""
    C, S = config.n_embd, config.n_shared_experts
    every, moe = list(range(config.n_layer)), list(config.moe_layers)
    dense = [layer for layer in every if layer not in moe]
    E, F = (config.n_experts, config.expert_hidden) if moe else (1, 1)
    order = torch.arange(3 * C).view(3, config.n_head, -1).transpose(0, 1).flatten()

    def of(layers: list[int], name: str, *shape: int) -> Floats:
        """(layers, *shape); zeros where the model has no such parameter, or there is no such layer."""
        found = [weights.get(f"transformer.h.{layer}.{name}", torch.zeros(shape)) for layer in layers]
        return torch.stack(found).numpy() if found else np.zeros((0, *shape), np.float32)

    def bias(layers: list[int], name: str, *shape: int) -> Floats:
        return _fill(of(layers, name, *shape))

    def norm(name: str) -> Floats:
        return np.stack([of(every, f"{name}.weight", C), of(every, f"{name}.bias", C)], axis=1)

    def experts(name: str, *shape: int) -> Floats:
        chosen, shared = of(moe, f"mlp.experts.{name}", E, *shape), of(moe, f"mlp.shared.{name}", S, *shape)
        return np.concatenate([chosen, shared], axis=1)

    ln_f = [weights[f"transformer.ln_f.{name}"] for name in ("weight", "bias") if f"transformer.ln_f.{name}" in weights]
    return Weights(
        wte=weights["transformer.wte.weight"].numpy(),
        wpe=weights["transformer.wpe.weight"].numpy(),
        ln_1=norm("ln_1"),
        attn=pack(of(every, "attn.c_attn.weight", 3 * C, C)[:, order]),
        attn_bias=_fill(of(every, "attn.c_attn.bias", 3 * C)[:, order]),
        attn_out=pack(of(every, "attn.c_proj.weight", C, C)),
        attn_out_bias=bias(every, "attn.c_proj.bias", C),
        ln_2=norm("ln_2"),
        mlp_in=pack(of(dense, "mlp.c_fc.weight", 4 * C, C)),
        mlp_in_bias=bias(dense, "mlp.c_fc.bias", 4 * C),
        mlp_out=pack(of(dense, "mlp.c_proj.weight", C, 4 * C)),
        mlp_out_bias=bias(dense, "mlp.c_proj.bias", C),
        router=pack(of(moe, "mlp.router.weight", E, C)),
        balance_bias=of(moe, "mlp.router.balance_bias", E),
        expert_in=pack(experts("w_in", C, F).swapaxes(2, 3)),
        expert_in_bias=_fill(experts("b_in", F)),
        expert_out=pack(experts("w_out", F, C).swapaxes(2, 3)),
        expert_out_bias=_fill(experts("b_out", C)),
        ln_f=torch.stack([*ln_f, torch.zeros(C)][:2]).numpy(),
        place=np.array([-1 - moe.index(layer) if layer in moe else dense.index(layer) for layer in every]),
    )


def _fill(bias: Floats) -> Floats:
    """The last dimension filled up with zeros to whole panels."""
    width = padded(bias.shape[-1])
    return np.ascontiguousarray(np.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, width - bias.shape[-1])]))
