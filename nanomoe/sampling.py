"""The law of the next token, and the proof that a rounded computation obeys it.

The law is stated over exact logits. With temperature 0 (or top_k 1) the token is the likeliest one, ties to the lowest
id. Otherwise the logits over the temperature, cut to the `top_k` likeliest and then to the likeliest that together hold
`top_p`, are sampled with Gumbel noise (argmax of log-weight plus noise is a draw from the softmax), in two draws so
that a vocabulary of V needs V / 256 + 256 random numbers, not V: a block of 256 ids by its mass, then an id in it. The
noise of a sequence is a stream of its own, and every token takes the same share of it.

`choose` is given logits that may each be wrong by `error`. It answers with a token only if no logits within that error
give another one, and None otherwise: the caller then computes in float64. So a text depends on the weights, the prompt
and the seed, and not on the shapes of the products that happened to be computed with it, which change with the number
of other sequences being served. Knows no model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 256
"""Ids that share one draw of the first stage. Part of the law: another value gives other texts for the same seed."""

TIE = 1e-9
"""Logits that differ by less count as equal: float64 sums in another order differ by about 1e-14."""

MOST_CONTENDERS = 16
"""Blocks that are worth refining one by one."""

_NUCLEUS = 1024
"""Tokens that are sorted first when the likeliest that hold `top_p` are sought."""

ROUNDING = 3e-5
"""Derived: what exp and sums of at most 256 float32 terms can add to the log of a mass; 256 * 2**-24 is 1.5e-5."""

WIDEST = 20.0
"""Derived: errors, over the temperature, below which float32 weights that underflow cannot matter. They are 87 below
the largest; 256 of them, with noise between -3.7 and 36.8, are still 41 behind, which two such errors do not make up
for."""

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits, 0 or more; 0 takes the likeliest token."""

    top_k: int | None = None
    """Only this many likeliest tokens (with those equal to the last of them); None all."""

    top_p: float | None = None
    """Least probability that the likeliest tokens, among those that `top_k` leaves, must hold together: only these are
    drawn, with those equal to the last of them. In (0, 1]; None or 1 keeps all."""

    @property
    def greedy(self) -> bool:
        """Whether no noise is used."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def allows_all(self) -> bool:
        """Whether every token may be drawn."""
        return not self.greedy and self.top_k is None and not self.cuts_by_mass

    @property
    def cuts_by_mass(self) -> bool:
        """Whether probabilities decide which tokens are allowed."""
        return not self.greedy and self.top_p is not None and self.top_p < 1


SMALLEST_UNIFORM = 2.0**-54
"""Stands for a draw of 0, whose log is not finite."""


@dataclass(frozen=True)
class Noise:
    """The noise of one new token."""

    uniform: Floats
    """(ceil(V / 256) + 256,), float64 in [0, 1): a draw for each block, and one for each place in the chosen block."""

    @cached_property
    def blocks(self) -> Floats:
        """(ceil(V / 256),) standard Gumbel noise."""
        return _gumbel(self.uniform[:-BLOCK])

    @cached_property
    def places(self) -> Floats:
        """(256,) standard Gumbel noise."""
        return _gumbel(self.uniform[-BLOCK:])


class NoiseStream:
    """The noise of one sequence, from a generator of its own: choice `index` of a request with `seed`."""

    def __init__(self, seed: int, index: int, vocab_size: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
        self._n_blocks = -(-vocab_size // BLOCK)

    def draw(self) -> Noise:
        """The noise of the next token."""
        return Noise(self._generator.random(self._n_blocks + BLOCK))


def _gumbel(uniform: Floats) -> Floats:
    gumbel: Floats = -np.log(-np.log(np.maximum(uniform, SMALLEST_UNIFORM)))
    return gumbel


def choose(
    logits: Floats, sampling: Sampling, noise: Noise | None = None, *, ids: Ids | None = None, error: float = 0.0
) -> int | None:
    """The token that the law picks; None if logits within `error` of the given ones could make it another.

    Args:
        logits: (V,), or (S,) of candidates `ids` that hold every token which could be allowed.
        noise: may be missing only if sampling is greedy.
        error: largest difference of any logit from its exact value. With 0 there is always an answer.
    """
    if sampling.greedy:
        rivals = np.flatnonzero(logits >= logits.max() - (2 * error + TIE))
        if error and len(rivals) != 1:  # none, where float32 overflowed
            return None
        return int(rivals.min() if ids is None else ids[rivals].min())
    assert noise is not None, "sampling needs noise"
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # a temperature near 0 overflows, harmlessly
        slack = error / sampling.temperature + ROUNDING if error else 0.0
        if not slack < WIDEST:
            return None
        scaled = (logits - logits.max()) / sampling.temperature
        sure, possible = _allowed(scaled, sampling, slack)
        weights = np.exp(scaled)
        most = np.log(_block_masses(weights, possible, ids, len(noise.blocks))) + noise.blocks
        least = (
            most if sure is possible else np.log(_block_masses(weights, sure, ids, len(noise.blocks))) + noise.blocks
        )
        block = int(least.argmax())
        if slack and not least[block] - np.delete(most, block).max(initial=-np.inf) > 2 * slack:
            return None
        if ids is None:
            members = np.arange(block * BLOCK, min((block + 1) * BLOCK, len(logits)))
        else:
            members = np.flatnonzero(ids // BLOCK == block)
        if possible is not None:
            members = members[possible[members]]
        token_ids = members if ids is None else ids[members]
        perturbed = scaled[members] + noise.places[token_ids % BLOCK]
        best = int(perturbed.argmax()) if not slack else _clear_maximum(perturbed, slack)
        if best is None or (slack and sure is not None and not sure[members[best]]):
            return None
    return int(token_ids[best])


def choose_among_blocks(
    rough: Floats,
    unit: float,
    bound: float,
    refine: Callable[[int], Floats],
    error: float,
    temperature: float,
    noise: Noise,
) -> int | None:
    """`choose` without top_k and top_p, at the price of few exact logits: rough ones tell which blocks are in
    question, and only these are refined. None where that does not decide.

    Args:
        rough: (V,) logits in units of `unit`, each wrong by at most `bound`, which is in logits.
        refine: gives the logits of a block's tokens, each wrong by at most `error`.
        temperature: above 0.
    """
    slack = error / temperature + ROUNDING
    if not bound / temperature + slack < WIDEST:
        return None
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = rough * (unit / temperature)
        largest = scaled.max()
        scaled -= largest
        masses = _block_masses(np.exp(scaled, out=scaled), None, None, len(noise.blocks))
        scores = np.log(masses) + noise.blocks
        contenders = np.flatnonzero(scores >= scores.max() - 2 * (bound / temperature + ROUNDING))
        if not 0 < len(contenders) <= MOST_CONTENDERS:
            return None
        refined = [refine(int(block)) / temperature - largest for block in contenders]
        refined_scores = [np.log(np.exp(block).sum()) for block in refined] + noise.blocks[contenders]
        best = _clear_maximum(refined_scores, slack)
        if best is None:
            return None
        token = _clear_maximum(refined[best] + noise.places[: len(refined[best])], slack)
        return None if token is None else int(contenders[best]) * BLOCK + token


def _clear_maximum(scores: Floats, slack: float) -> int | None:
    """Where the largest of scores is that may each be wrong by `slack`; None if that could be elsewhere."""
    best = int(scores.argmax())
    runner_up = np.delete(scores, best).max(initial=-np.inf)
    return best if scores[best] - runner_up > 2 * slack else None


def _block_masses(weights: Floats, allowed: Mask | None, ids: Ids | None, n_blocks: int) -> Floats:
    """(n_blocks,) sums of the weights of each block's allowed tokens."""
    if allowed is not None:
        weights = weights * allowed
    if ids is not None:
        return np.bincount(ids // BLOCK, weights, n_blocks).astype(np.float64)
    return np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))


def _allowed(scaled: Floats, sampling: Sampling, slack: float) -> tuple[Mask | None, Mask | None]:
    """The tokens that are surely allowed, and those that may be; the same object where they are the same set, None
    where nothing is cut. `scaled` are logits over the temperature, at most 0, each wrong by at most `slack`."""
    sure = possible = None
    margin = 2 * slack + TIE / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        last = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        possible = scaled >= last - margin
        sure = possible if not slack or possible.sum() == sampling.top_k else scaled > last + 2 * slack
    if sampling.cuts_by_mass:
        assert sampling.top_p is not None
        values = scaled if possible is None else scaled[possible]
        most_total = np.exp(values.astype(np.float64)).sum()
        least_total = most_total if sure is possible else np.exp(scaled[sure].astype(np.float64)).sum()
        # A token is allowed if those before it hold less than top_p. Each mass may be wrong by a factor exp(slack), and
        # neighbours closer than the margin may stand in either order.
        for size in (_NUCLEUS, len(values)):  # all have to be sorted only if the probabilities are very even
            falling = _largest(values, size)
            mass_before = np.concatenate(([0.0], np.cumsum(np.exp(falling))))  # of the n likeliest
            last_possible = np.searchsorted(mass_before, sampling.top_p * most_total * np.exp(2 * slack)) - 1
            if last_possible < len(falling):
                break
        if last_possible < len(falling):
            within = scaled >= falling[last_possible] - margin
            possible = within if possible is None else possible & within
        if not slack:
            return possible, possible
        first_unsure = np.searchsorted(mass_before, sampling.top_p * least_total * np.exp(-2 * slack))
        if first_unsure < len(values):  # beyond those that are sorted, none is larger than the last of them
            within = scaled > falling[min(first_unsure, len(falling) - 1)] + 2 * slack
            sure = within if sure is None else sure & within
    return sure, possible


def _largest(values: Floats, size: int) -> Floats:
    """The `size` largest, falling, as float64."""
    chosen = values if size >= len(values) else np.partition(values, -size)[-size:]
    return -np.sort(-chosen).astype(np.float64)
