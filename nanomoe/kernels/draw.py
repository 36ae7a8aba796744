"""The next token of rows that are sampled, with or without top_k: the law of `nanomoe.sampling`, by as few exact logits
as it needs.

8-bit products tell every logit within a bound, and so every block's mass and noise within one. Only the blocks that can
have the largest sum of both are looked into, and only their tokens' embeddings are read in float32. An answer is given
where no logits within the bounds give another; where there is none, the caller computes more precisely.

Shape letters: N rows, V vocabulary, C channels, G groups, S tokens of a list, U uniform draws (`sampling.Noise`).
"""

import numba
import numpy as np

from nanomoe.kernels import Array, compiled, compiled_parallel, use_threads
from nanomoe.kernels.products import GROUP, Products
from nanomoe.kernels.short_list import Ids, Wide, float32_logit
from nanomoe.sampling import BLOCK, MOST_CONTENDERS, ROUNDING, SMALLEST_UNIFORM, TIE, WIDEST

_GROUPS_OF_BLOCK = BLOCK // GROUP


def draw(
    products_NV: Products,
    largest_NG: Products,
    units_N: Wide,
    bounds_N: Wide,
    errors_N: Wide,
    top_k_N: Ids,
    temperature_N: Wide,
    uniform_NU: Wide,
    x_NC: Array,
    wte_VC: Array,
) -> list[int | None]:
    """The token of each row; None where the bounds do not decide.

    Args:
        products_NV: products of the rows' integers with the embedding's; there may be more, which belong to no token.
        largest_NG: the largest of each group of them.
        units_N: what turns them into logits.
        bounds_N: how far those can be from the exact logits.
        errors_N: how far float32 logits can be from them.
        top_k_N: how many likeliest are allowed; V allows all.
        temperature_N: above 0.
        uniform_NU: the draws of each row's noise.
    """
    tokens_N = np.empty(len(x_NC), np.int64)
    rows = (units_N, bounds_N, errors_N, top_k_N, temperature_N, uniform_NU, x_NC)
    use_threads(len(x_NC))
    _draw(products_NV, largest_NG, rows, wte_VC, tokens_N)
    return [None if token < 0 else token for token in tokens_N.tolist()]


@compiled_parallel
def _draw(products_NV, largest_NG, rows, wte_VC, tokens_N):
    for n in numba.prange(len(tokens_N)):
        tokens_N[n] = _draw_one(products_NV[n, : len(wte_VC)], largest_NG[n], n, rows, wte_VC)


@compiled
def _draw_one(products_V, largest_G, n, rows, wte_VC):
    """The token of one row, or -1. From here on logits are over the temperature."""
    units_N, bounds_N, errors_N, top_k_N, temperature_N, uniform_NU, x_NC = rows
    temperature, uniform_U, x_C, top_k = temperature_N[n], uniform_NU[n], x_NC[n], top_k_N[n]
    factor, bound = units_N[n] / temperature, bounds_N[n] / temperature
    slack = errors_N[n] / temperature + ROUNDING
    top = largest_G.max() * factor
    if not np.isfinite(top) or not bound + slack < WIDEST:
        return -1
    margin = 2 * bound + TIE / temperature
    cuts = top_k < len(products_V)
    edges = _rough_edges(largest_G, top_k, factor, margin) if cuts else (-np.inf, -np.inf)
    token = _between(edges, products_V, largest_G, factor, top, bound, slack, temperature, uniform_U, x_C, wte_VC)
    if token < 0 and cuts:
        edges = _close_edges(products_V, largest_G, top_k, factor, margin)
        token = _between(edges, products_V, largest_G, factor, top, bound, slack, temperature, uniform_U, x_C, wte_VC)
    return token


@compiled
def _between(edges, products_V, largest_G, factor, top, bound, slack, temperature, uniform_U, x_C, wte_VC):
    """The token if those from `edges[0]` on may be allowed, and those from `edges[1]` on surely are; or -1."""
    blocks, n_blocks = _contenders(edges, products_V, largest_G, factor, top, bound + ROUNDING, uniform_U)
    if n_blocks == 0:
        return -1
    return _decide(blocks[:n_blocks], edges, products_V, factor, top, slack, temperature, uniform_U, x_C, wte_VC)


@compiled
def _rough_edges(largest_G, top_k, factor, margin):
    """From which logit on a token may be among the `top_k` likeliest, and surely is: by the groups' largest alone.

    At least top_k tokens reach the top_k-th largest of them. And the top_k likeliest are in `top_k / GROUP` groups or
    more, so the last of these reaches no higher than the largest of the group of that rank.
    """
    G = len(largest_G)
    rank = (top_k + GROUP - 1) // GROUP
    reached = np.partition(largest_G, G - top_k)[G - top_k] * factor if top_k <= G else -np.inf
    reachable = np.partition(largest_G, G - rank)[G - rank] * factor
    return reached - margin, reachable + margin


@compiled
def _close_edges(products_V, largest_G, top_k, factor, margin):
    """As `_rough_edges`, by the products of all tokens in question; the same edge twice where it cuts off exactly the
    `top_k` likeliest. The exact logit of the last of these is within half the margin of the rough one."""
    least = _rough_edges(largest_G, top_k, factor, margin)[0]
    n_groups = 0
    for g in range(len(largest_G)):
        n_groups += largest_G[g] * factor >= least
    found_S = np.empty(n_groups * GROUP, np.int32)
    found = 0
    for g in range(len(largest_G)):
        if largest_G[g] * factor >= least:
            for product in products_V[g * GROUP : (g + 1) * GROUP]:
                found_S[found] = product
                found += product * factor >= least
    last = np.partition(found_S[:found], found - top_k)[found - top_k] * factor
    n_possible = 0
    for product in found_S[:found]:
        n_possible += product * factor >= last - margin
    return last - margin, last - margin if n_possible == top_k else last + margin


@compiled
def _gumbel(uniform):
    return -np.log(-np.log(max(uniform, SMALLEST_UNIFORM)))


@compiled
def _contenders(edges, products_V, largest_G, factor, top, bound, uniform_U):
    """The blocks that can have the largest sum of log mass and noise, where each logit may be wrong by `bound`, and
    their number; 0 where they are too many, or no token is surely allowed."""
    least_possible, least_sure = edges
    n_blocks = len(uniform_U) - BLOCK
    noise_G, most_G, where_G = np.empty(n_blocks), np.empty(n_blocks), np.empty(n_blocks, np.int64)
    reached = -np.inf
    # First by the groups' largest: a group's mass is at least that one's, and at most `GROUP` times as much.
    for block in range(n_blocks):
        most, least = 0.0, 0.0
        for g in range(block * _GROUPS_OF_BLOCK, min((block + 1) * _GROUPS_OF_BLOCK, len(largest_G))):
            largest = largest_G[g] * factor
            if largest >= least_possible:
                weight = np.exp(largest - top)
                most += GROUP * weight
                if largest >= least_sure:
                    least += weight
        noise_G[block] = _gumbel(uniform_U[block]) if most > 0 else 0.0
        most_G[block] = np.log(most) + noise_G[block] + bound if most > 0 else -np.inf
        if least > 0:
            reached = max(reached, np.log(least) + noise_G[block] - bound)
    if reached == -np.inf:
        return where_G, 0
    # Then, where that leaves a chance, by the products of all tokens.
    could_reach = reached
    for block in range(n_blocks):
        if most_G[block] >= could_reach:
            most, least = 0.0, 0.0
            for product in products_V[block * BLOCK : (block + 1) * BLOCK]:
                rough = product * factor
                if rough >= least_possible:
                    weight = np.exp(np.float32(rough - top))
                    most += weight
                    if rough >= least_sure:
                        least += weight
            most_G[block] = np.log(most) + noise_G[block] + bound if most > 0 else -np.inf
            if least > 0:
                reached = max(reached, np.log(least) + noise_G[block] - bound)
    n = 0
    for block in range(n_blocks):
        if most_G[block] >= reached:
            where_G[n] = block
            n += 1
    return where_G, n if n <= MOST_CONTENDERS else 0


@compiled
def _decide(blocks, edges, products_V, factor, top, slack, temperature, uniform_U, x_C, wte_VC):
    """The token by float32 logits of the contenders, each wrong by at most `slack`; or -1."""
    least_possible, least_sure = edges
    n_blocks = len(uniform_U) - BLOCK
    winner, winner_least, winner_most, others_most = -1, -np.inf, -np.inf, -np.inf
    ids_T, sure_T = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.bool_)
    for block in blocks:
        n = 0
        for v in range(block * BLOCK, min((block + 1) * BLOCK, len(products_V))):
            rough = products_V[v] * factor
            ids_T[n], sure_T[n] = v, rough >= least_sure
            n += rough >= least_possible
        most, least = 0.0, 0.0
        best, best_score, runner_up = -1, -np.inf, -np.inf
        for t in range(n):
            scaled = np.float64(float32_logit(x_C, wte_VC[ids_T[t]])) / temperature - top
            weight = np.exp(scaled)
            most += weight
            least += weight * sure_T[t]
            score = scaled + _gumbel(uniform_U[n_blocks + ids_T[t] % BLOCK])
            if score > best_score:
                best, best_score, runner_up = t, score, best_score
            elif score > runner_up:
                runner_up = score
        noise = _gumbel(uniform_U[block])
        most_score = np.log(most) + noise
        least_score = np.log(least) + noise if least > 0 else -np.inf
        if least_score > winner_least:
            others_most = max(others_most, winner_most)
            winner_least, winner_most = least_score, most_score
            winner = ids_T[best] if best_score - runner_up > 2 * slack and sure_T[best] else -1
        else:
            others_most = max(others_most, most_score)
    return winner if winner_least - others_most > 2 * slack else -1
