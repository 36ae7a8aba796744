"""What follows from a router's logits: scores, the experts with the highest of them, their gates, and the losses of
balance and size. Forward in two launches, backward in one; the product that gives the logits is torch's.

    noisy = logits + noise * softplus(noise_logits)
    p = s = softmax(noisy), or s = sigmoid(noisy) and p = s / sum(s);  chosen = the k highest of s + balance_bias
    gates = s[chosen], over their sum where they are renormalised
    aux = E * sum_e (counts_e / (T * K)) * mean_t(p_te);  z = mean_t(logsumexp(logits_t)^2)

The choice and the counts have no gradient. Shape letters as in `nanomoe.model.moe`; P parts of the rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanomoe.model.moe import Router
from nanomoe.training.steps.kernels.launching import OPTIONS, operator, power_of_two

_MOST_PARTS = 1024
"""Programs that share the rows: with one warp each, several run on a processor. Assumed."""

_AT_ONCE = 4096
"""Numbers of the parts that are added up together. Assumed."""


def _options(block: int) -> dict[str, Any]:
    """Most rows have few experts, for which one warp is enough."""
    return OPTIONS | {"num_warps": max(1, min(8, block // 256))}


@triton.jit
def _softplus(x):
    return tl.where(x > 20, x, tl.log(1 + tl.exp(x)))  # as torch does


@triton.jit
def _scored(logits, noise_TE, noise_logits_TE, there, inside, HAS_NOISE: tl.constexpr, IS_SOFTMAX: tl.constexpr):
    """Scores and probabilities of a row, 0 beyond its experts, and what the probabilities are sums over."""
    noisy = logits
    if HAS_NOISE:
        noise = tl.load(noise_TE + there, mask=inside, other=0)
        noisy += noise * _softplus(tl.load(noise_logits_TE + there, mask=inside, other=0))
    if IS_SOFTMAX:
        shifted = tl.where(inside, tl.exp(noisy - tl.max(tl.where(inside, noisy, float("-inf")), 0)), 0.0)
        total = tl.sum(shifted, 0)
        probs = shifted / total
        scores = probs
    else:
        scores = tl.where(inside, 1 / (1 + tl.exp(-noisy)), 0.0)
        total = tl.sum(scores, 0)
        probs = scores / total
    return scores, probs, total


@triton.jit
def _logsumexp(logits, inside):
    most = tl.max(tl.where(inside, logits, float("-inf")), 0)
    return most + tl.log(tl.sum(tl.where(inside, tl.exp(logits - most), 0.0), 0))


@triton.jit(do_not_specialize=["T", "E", "K"])
def _forward(
    logits_TE, noise_TE, noise_logits_TE, bias_E, probs_TE, chosen_TK, gates_TK, counts_PE, sums_PE, squares_P, T, E, K,
    HAS_NOISE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_SOFTMAX: tl.constexpr, RENORMALISES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < E
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_E + e, mask=inside, other=0)
    counts, sums = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((1,), tl.float32)  # a block, since a loop carries none that is not
    stride = E.to(tl.int64)
    for row in range(part, T, tl.num_programs(0)):
        there = row * stride + e
        logits = tl.load(logits_TE + there, mask=inside, other=0)
        scores, probs, _ = _scored(logits, noise_TE, noise_logits_TE, there, inside, HAS_NOISE, IS_SOFTMAX)
        tl.store(probs_TE + there, probs, mask=inside)
        wanted = scores + bias
        wanted = tl.where(wanted == wanted, wanted, float("inf"))  # a choice exists even where nothing is a number
        wanted = tl.where(inside, wanted, float("-inf"))
        place = tl.full((BLOCK,), -1, tl.int32)
        for j in range(K):
            # Of equals the lowest index.
            best = tl.min(tl.where((wanted == tl.max(wanted, 0)) & inside, e, BLOCK - 1), 0)
            place = tl.where(e == best, j, place)
            wanted = tl.where(e == best, float("-inf"), wanted)
        is_chosen = place >= 0
        gates = tl.where(is_chosen, scores, 0.0)
        if RENORMALISES:
            gates /= tl.sum(gates, 0)
        slots = row * K.to(tl.int64) + place
        tl.store(chosen_TK + slots, e.to(tl.int64), mask=is_chosen)
        tl.store(gates_TK + slots, gates, mask=is_chosen)
        counts += is_chosen.to(tl.int64)
        sums += probs
        lse = _logsumexp(logits, inside)
        square += lse * lse
    there = part * E + e
    tl.store(counts_PE + there, counts, mask=inside)
    tl.store(sums_PE + there, sums, mask=inside)
    tl.store(squares_P + part + tl.arange(0, 1), square)


@triton.jit(do_not_specialize=["P", "T", "E", "K"])
def _add_up(
    counts_PE, sums_PE, squares_P, counts_E, aux, z, P, T, E, K, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Counts and losses of all parts, so many of them at a time."""
    e = tl.arange(0, BLOCK)
    inside = e < E
    counts, sums = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, P, ROWS):
        part = first + tl.arange(0, ROWS)
        there = part[:, None] * E + e[None, :]
        both = (part[:, None] < P) & inside[None, :]
        counts += tl.sum(tl.load(counts_PE + there, mask=both, other=0), 0)
        sums += tl.sum(tl.load(sums_PE + there, mask=both, other=0), 0)
        squares += tl.load(squares_P + part, mask=part < P, other=0)
    tl.store(counts_E + e, counts, mask=inside)
    n_tokens = T.to(tl.float32)
    share = counts.to(tl.float32) / (n_tokens * K)
    tl.store(aux, E * tl.sum(share * (sums / n_tokens), 0))
    tl.store(z, tl.sum(squares, 0) / n_tokens)


@triton.jit(do_not_specialize=["T", "E", "K"], do_not_specialize_on_alignment=["d_aux", "d_z"])
def _backward(
    logits_TE, noise_TE, noise_logits_TE, chosen_TK, counts_E, d_gates_TK, d_aux, d_z, d_logits_TE, d_noise_logits_TE,
    T, E, K, HAS_NOISE: tl.constexpr, IS_SOFTMAX: tl.constexpr, RENORMALISES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    inside = e < E
    there = row * E + e
    logits = tl.load(logits_TE + there, mask=inside, other=0)
    scores, probs, total = _scored(logits, noise_TE, noise_logits_TE, there, inside, HAS_NOISE, IS_SOFTMAX)
    d_gates = tl.zeros((BLOCK,), tl.float32)
    is_chosen = e < 0
    for j in range(K):
        is_this = e == tl.load(chosen_TK + row * K + j)
        d_gates += tl.where(is_this, tl.load(d_gates_TK + row * K + j), 0.0)
        is_chosen = is_chosen | is_this
    d_scores = d_gates
    if RENORMALISES:
        of_chosen = tl.sum(tl.where(is_chosen, scores, 0.0), 0)
        shift = tl.sum(d_gates * scores, 0) / of_chosen
        d_scores = tl.where(is_chosen, (d_gates - shift) / of_chosen, 0.0)
    n_tokens = T.to(tl.float32)
    share = tl.load(counts_E + e, mask=inside, other=0).to(tl.float32) / (n_tokens * K)
    d_probs = tl.load(d_aux) * E * share / n_tokens
    if IS_SOFTMAX:
        d_probs += d_scores
        d_noisy = probs * (d_probs - tl.sum(probs * d_probs, 0))
    else:
        d_scores += (d_probs - tl.sum(probs * d_probs, 0)) / total
        d_noisy = d_scores * scores * (1 - scores)
    if HAS_NOISE:
        given = tl.load(noise_logits_TE + there, mask=inside, other=0)
        slope = 1 / (1 + tl.exp(-given))
        d_given = d_noisy * tl.load(noise_TE + there, mask=inside, other=0) * slope
        tl.store(d_noise_logits_TE + there, d_given, mask=inside)
    lse = _logsumexp(logits, inside)
    d_logits = d_noisy + tl.load(d_z) * 2 * lse / n_tokens * tl.exp(logits - lse)
    tl.store(d_logits_TE + there, d_logits, mask=inside)


@operator(
    "route(Tensor logits_TE, Tensor? noise_TE, Tensor? noise_logits_TE, Tensor? bias_E, int K, bool is_softmax, "
    "bool renormalises) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _launch_forward(
    logits_TE: Tensor, noise_TE: Tensor | None, noise_logits_TE: Tensor | None, bias_E: Tensor | None, K: int,
    is_softmax: bool, renormalises: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (T, E), P = logits_TE.shape, min(len(logits_TE), _MOST_PARTS)
    probs_TE, gates_TK = torch.empty_like(logits_TE), logits_TE.new_empty(T, K)
    chosen_TK = logits_TE.new_empty(T, K, dtype=torch.int64)
    counts_PE = logits_TE.new_empty(P, E, dtype=torch.int64)
    sums_PE, squares_P = logits_TE.new_empty(P, E), logits_TE.new_empty(P)
    _forward[(P,)](
        logits_TE, noise_TE, noise_logits_TE, bias_E, probs_TE, chosen_TK, gates_TK, counts_PE, sums_PE, squares_P,
        T, E, K, HAS_NOISE=noise_TE is not None, HAS_BIAS=bias_E is not None, IS_SOFTMAX=is_softmax,
        RENORMALISES=renormalises, BLOCK=power_of_two(E), **_options(power_of_two(E)),
    )  # fmt: skip
    return probs_TE, chosen_TK, gates_TK, counts_PE, sums_PE, squares_P


@operator("add_up_routes(Tensor counts_PE, Tensor sums_PE, Tensor squares_P, int T, int K) -> (Tensor, Tensor, Tensor)")
def _launch_add_up(
    counts_PE: Tensor, sums_PE: Tensor, squares_P: Tensor, T: int, K: int
) -> tuple[Tensor, Tensor, Tensor]:
    (P, E), BLOCK = counts_PE.shape, power_of_two(counts_PE.shape[1])
    counts_E, aux, z = counts_PE.new_empty(E), sums_PE.new_empty(()), sums_PE.new_empty(())
    rows = max(1, _AT_ONCE // BLOCK)
    _add_up[(1,)](counts_PE, sums_PE, squares_P, counts_E, aux, z, P, T, E, K, ROWS=rows, BLOCK=BLOCK, **OPTIONS)
    return counts_E, aux, z


@operator(
    "route_backward(Tensor logits_TE, Tensor? noise_TE, Tensor? noise_logits_TE, Tensor chosen_TK, Tensor counts_E, "
    "Tensor d_gates_TK, Tensor d_aux, Tensor d_z, bool is_softmax, bool renormalises) -> (Tensor, Tensor)"
)
def _launch_backward(
    logits_TE: Tensor, noise_TE: Tensor | None, noise_logits_TE: Tensor | None, chosen_TK: Tensor, counts_E: Tensor,
    d_gates_TK: Tensor, d_aux: Tensor, d_z: Tensor, is_softmax: bool, renormalises: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, E), K = logits_TE.shape, chosen_TK.shape[1]
    d_logits_TE = torch.empty_like(logits_TE)
    d_noise_logits_TE = logits_TE.new_empty(0) if noise_TE is None else torch.empty_like(logits_TE)
    _backward[(T,)](
        logits_TE, noise_TE, noise_logits_TE, chosen_TK, counts_E, d_gates_TK, d_aux, d_z, d_logits_TE,
        d_noise_logits_TE, T, E, K, HAS_NOISE=noise_TE is not None, IS_SOFTMAX=is_softmax, RENORMALISES=renormalises,
        BLOCK=power_of_two(E), **_options(power_of_two(E)),
    )  # fmt: skip
    return d_logits_TE, d_noise_logits_TE


class Route(NamedTuple):
    """What a router decides; fields as of `nanomoe.model.moe.Routing`."""

    probs_TE: Tensor
    chosen_TK: Tensor
    gates_TK: Tensor
    counts_E: Tensor
    aux_loss: Tensor
    z_loss: Tensor


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, noise_TE: Tensor | None, noise_logits_TE: Tensor | None, bias_E: Tensor | None,
        K: int, is_softmax: bool, renormalises: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        probs_TE, chosen_TK, gates_TK, *parts = _launch_forward(
            logits_TE, noise_TE, noise_logits_TE, bias_E, K, is_softmax, renormalises
        )
        counts_E, aux, z = _launch_add_up(*parts, len(logits_TE), K)
        ctx.save_for_backward(logits_TE, noise_TE, noise_logits_TE, chosen_TK, counts_E)
        ctx.rest = is_softmax, renormalises
        ctx.mark_non_differentiable(probs_TE, chosen_TK, counts_E)
        return probs_TE, chosen_TK, gates_TK, counts_E, aux, z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, _, d_gates_TK, _, d_aux, d_z = gradients
        d_logits_TE, d_noise_logits_TE = _launch_backward(
            *ctx.saved_tensors, d_gates_TK.contiguous(), d_aux, d_z, *ctx.rest
        )
        return d_logits_TE, None, d_noise_logits_TE if ctx.saved_tensors[1] is not None else None, *[None] * 4


def route(
    logits_TE: Tensor, noise_TE: Tensor | None, noise_logits_TE: Tensor | None, balance_bias_E: Tensor | None, *,
    k: int, is_softmax: bool, renormalises: bool,
) -> Route:  # fmt: skip
    """What follows from the logits of a router, all float32; its reference is `nanomoe.model.moe.Router`.

    Args:
        logits_TE: clean.
        noise_TE: standard normal; None adds none, and then `noise_logits_TE` is None too.
        noise_logits_TE: how much of it each token deserves, before softplus.
        balance_bias_E: is added to the scores for the choice alone; None adds none.
    """
    return Route(*_Route.apply(logits_TE, noise_TE, noise_logits_TE, balance_bias_E, k, is_softmax, renormalises))


def route_by(router: Router, x_TC: Tensor, noise_TE: Tensor | None) -> tuple[Tensor, Route]:
    """The clean logits of the tokens `x_TC`, float32, and what follows from them."""
    noise_logits_TE = None
    if noise_TE is not None:
        assert router.noise_weight is not None, "noise needs router_noise"
        noise_TE, noise_logits_TE = noise_TE.contiguous(), x_TC @ router.noise_weight.T
    logits_TE = x_TC @ router.weight.T
    is_softmax, renormalises = router.score == "softmax", router.renormalises
    return logits_TE, route(
        logits_TE, noise_TE, noise_logits_TE, router.balance_bias, k=router.k, is_softmax=is_softmax,
        renormalises=renormalises,
    )  # fmt: skip
