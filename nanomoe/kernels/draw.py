"""The next token of rows that are sampled, with or without top_k: the law of `nanomoe.sampling`, by as few exact logits
as it needs.

8-bit products tell every logit within a bound, and so every block's mass and noise within one. Only the blocks that can
have the largest sum of both are looked into, and only their tokens' embeddings are read in float32. An answer is given
where no logits within the bounds give another; where there is none, the caller computes more precisely.

Shape letters: N rows, V vocabulary, C channels, G groups, T tokens of a group, S tokens of a list, B blocks, U uniform
draws (`sampling.Noise`).
"""

from typing import NamedTuple

import numba
import numpy as np

from nanomoe.kernels import Array, compiled, compiled_parallel, use_threads
from nanomoe.kernels.products import GROUP, Products, read_group
from nanomoe.kernels.short_list import Ids, Wide, float32_logit
from nanomoe.sampling import BLOCK, MOST_CONTENDERS, ROUNDING, SMALLEST_UNIFORM, TIE, WIDEST

_GROUPS_OF_BLOCK = BLOCK // GROUP
_LOG_BLOCK = np.log(BLOCK)

_FEW = 2
"""Groups for each of the `top_k`: where more could hold one of them, they are not read for an exact edge. Assumed."""


class Rows(NamedTuple):
    """What N rows are sampled by."""

    units: Wide
    """(N,): what turns products into logits."""

    rough_errors: Wide
    """(N,): how far those can be from the exact logits."""

    errors: Wide
    """(N,): how far float32 logits can be from them."""

    top_k: Ids
    """(N,): how many likeliest are allowed; V allows all."""

    temperature: Wide
    """(N,): above 0."""

    uniform: Wide
    """(N, U): the draws of each row's noise."""

    x: Array
    """(N, C): the hidden states."""


class _Row(NamedTuple):
    """One row; its logits are over the temperature."""

    products: Products
    n: int
    factor: float
    """What turns products into logits."""
    top: float
    """The largest of these rough logits."""
    bound: float
    """How far they can be from the exact ones, and the log of a sum of their exponentials from that of the exact."""
    slack: float
    """How far float32 logits can be, and the log of such a sum."""
    temperature: float
    uniform_U: Wide
    x_C: Array


class _Edges(NamedTuple):
    """From which rough logit on a token may be allowed, and surely is."""

    possible: float
    sure: float


def draw(products: Products, rows: Rows, wte_VC: Array) -> list[int | None]:
    """The token of each row; None where the bounds do not decide."""
    tokens_N = np.empty(len(rows.x), np.int64)
    use_threads(len(rows.x))
    _draw(products, rows, wte_VC, tokens_N)
    return [None if token < 0 else token for token in tokens_N.tolist()]


@compiled_parallel
def _draw(products, rows, wte_VC, tokens_N):
    for n in numba.prange(len(tokens_N)):
        tokens_N[n] = _draw_one(products, rows, n, wte_VC)


@compiled
def _draw_one(products, rows, n, wte_VC):
    """The token of one row, or -1."""
    temperature, top_k = rows.temperature[n], rows.top_k[n]
    factor, bound = rows.units[n] / temperature, rows.rough_errors[n] / temperature
    slack = rows.errors[n] / temperature + ROUNDING
    top = products.largest[n].max() * factor
    if not np.isfinite(top) or not bound + slack < WIDEST:
        return -1
    margin = 2 * bound + TIE / temperature
    row = _Row(products, n, factor, top, bound + ROUNDING, slack, temperature, rows.uniform[n], rows.x[n])
    edges = _edges(row, top_k, margin) if top_k < len(wte_VC) else _Edges(-np.inf, -np.inf)
    blocks_B, n_blocks = _contenders(row, edges)
    return _decide(row, edges, blocks_B[:n_blocks], wte_VC) if n_blocks else -1


@compiled
def _edges(row, top_k, margin):
    """The edges of the `top_k` likeliest; the same edge twice where it cuts off exactly those. The exact logit of the
    last of them is within half the margin of the rough one."""
    largest_G = row.products.largest[row.n]
    # At least top_k tokens reach the top_k-th largest of the groups' largest, so the top_k likeliest do.
    G = len(largest_G)
    reached = np.partition(largest_G, G - top_k)[G - top_k] * row.factor if top_k <= G else -np.inf
    found_S = _logits_from(row, reached)
    last = np.partition(found_S, len(found_S) - top_k)[len(found_S) - top_k]
    n_groups = 0
    for g in range(G):
        n_groups += largest_G[g] * row.factor >= last - margin
    exactly = n_groups <= _FEW * top_k and len(_logits_from(row, last - margin)) == top_k
    return _Edges(last - margin, last - margin if exactly else last + margin)


@compiled
def _logits_from(row, least):
    """The rough logits that are at least `least`, in the order of their tokens."""
    largest_G, out_1T = row.products.largest[row.n], np.empty((1, GROUP), np.int32)
    n_groups = 0
    for g in range(len(largest_G)):
        n_groups += largest_G[g] * row.factor >= least
    found_S = np.empty(n_groups * GROUP)
    found = 0
    for g in range(len(largest_G)):
        if largest_G[g] * row.factor >= least:
            read_group(row.products, row.n, g, out_1T)
            for product in out_1T[0]:
                found_S[found] = product * row.factor
                found += found_S[found] >= least
    return found_S[:found]


@compiled
def _gumbel(uniform):
    return -np.log(-np.log(max(uniform, SMALLEST_UNIFORM)))


@compiled
def _contenders(row, edges):
    """The blocks that can have the largest sum of log mass and noise, where each logit may be wrong by the bound, and
    their number; 0 where they are too many, or no token is surely allowed.

    A block's mass is bounded ever closer, for ever fewer blocks: by its largest token, by its groups' largest, by all
    its products. What any block surely reaches is what others have to beat.
    """
    largest_G = row.products.largest[row.n]
    n_blocks = len(row.uniform_U) - BLOCK
    noise_B, most_B, where_B = np.empty(n_blocks), np.full(n_blocks, -np.inf), np.empty(n_blocks, np.int64)
    reached = -np.inf
    for block in range(n_blocks):
        largest = np.int32(largest_G[block * _GROUPS_OF_BLOCK])
        for g in range(block * _GROUPS_OF_BLOCK + 1, min((block + 1) * _GROUPS_OF_BLOCK, len(largest_G))):
            largest = max(largest, largest_G[g])
        logit = largest * row.factor
        if logit >= edges.possible:
            noise_B[block] = _gumbel(row.uniform_U[block])
            most_B[block] = logit - row.top + _LOG_BLOCK + noise_B[block] + row.bound
            if logit >= edges.sure:
                reached = max(reached, logit - row.top + noise_B[block] - row.bound)
    if reached == -np.inf:
        return where_B, 0
    for closely in (False, True):
        to_beat = reached
        for block in range(n_blocks):
            if most_B[block] >= to_beat:
                most, least = _masses(row, edges, block, closely)
                most_B[block] = np.log(most) + noise_B[block] + row.bound
                if least > 0:
                    reached = max(reached, np.log(least) + noise_B[block] - row.bound)
    n = 0
    for block in range(n_blocks):
        if most_B[block] >= reached:
            where_B[n] = block
            n += 1
    return where_B, n if n <= MOST_CONTENDERS else 0


@compiled
def _masses(row, edges, block, closely):
    """What the rough logits of a block's tokens that may be allowed hold at most, and of those that surely are at
    least: by its groups' largest, or closely by all."""
    largest_G, out_1T = row.products.largest[row.n], np.empty((1, GROUP), np.int32)
    most, least = 0.0, 0.0
    for g in range(block * _GROUPS_OF_BLOCK, min((block + 1) * _GROUPS_OF_BLOCK, len(largest_G))):
        largest = largest_G[g] * row.factor
        if largest >= edges.possible:
            if closely:
                read_group(row.products, row.n, g, out_1T)
                for product in out_1T[0]:
                    logit = product * row.factor
                    if logit >= edges.possible:
                        weight = np.exp(np.float32(logit - row.top))
                        most += weight
                        if logit >= edges.sure:
                            least += weight
            else:
                weight = np.exp(largest - row.top)
                most += GROUP * weight
                if largest >= edges.sure:
                    least += weight
    return most, least


@compiled
def _decide(row, edges, blocks_B, wte_VC):
    """The token by float32 logits of the contenders; or -1."""
    largest_G, out_1T = row.products.largest[row.n], np.empty((1, GROUP), np.int32)
    n_blocks = len(row.uniform_U) - BLOCK
    winner, winner_least, winner_most, others_most = -1, -np.inf, -np.inf, -np.inf
    ids_S, sure_S = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.bool_)
    for block in blocks_B:
        n = 0
        for g in range(block * _GROUPS_OF_BLOCK, min((block + 1) * _GROUPS_OF_BLOCK, len(largest_G))):
            if largest_G[g] * row.factor >= edges.possible:
                read_group(row.products, row.n, g, out_1T)
                for t in range(min(GROUP, len(wte_VC) - g * GROUP)):
                    rough = out_1T[0, t] * row.factor
                    ids_S[n], sure_S[n] = g * GROUP + t, rough >= edges.sure
                    n += rough >= edges.possible
        most, least = 0.0, 0.0
        best, best_score, runner_up = -1, -np.inf, -np.inf
        for s in range(n):
            logit = np.float64(float32_logit(row.x_C, wte_VC[ids_S[s]])) / row.temperature - row.top
            weight = np.exp(logit)
            most += weight
            least += weight * sure_S[s]
            score = logit + _gumbel(row.uniform_U[n_blocks + ids_S[s] % BLOCK])
            if score > best_score:
                best, best_score, runner_up = s, score, best_score
            elif score > runner_up:
                runner_up = score
        noise = _gumbel(row.uniform_U[block])
        most_score = np.log(most) + noise
        least_score = np.log(least) + noise if least > 0 else -np.inf
        if least_score > winner_least:
            others_most = max(others_most, winner_most)
            winner_least, winner_most = least_score, most_score
            winner = ids_S[best] if best_score - runner_up > 2 * row.slack and sure_S[best] else -1
        else:
            others_most = max(others_most, most_score)
    return winner if winner_least - others_most > 2 * row.slack else -1
