"""How the next token is chosen from logits. Knows no model and no device.

With temperature 0 (or top_k 1) it is the likeliest token, ties to the lowest id. Otherwise the logits over the
temperature are cut to the `top_k` likeliest, then to the likeliest that together hold `top_p`, and one uniform number
from the sequence's own stream picks a token: the first, in the order of ids, at which the cumulative softmax of what is
left exceeds it. All sums are float64.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanomoe.config import SamplingConfig
from nanomoe.generation.logprobs import LogProbs, TokenLogProb

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]

OVERFLOW = "the model's logits overflow float32"
"""What is said where the largest logit is not a finite number."""


class Candidates(NamedTuple):
    """A superset of the tokens that can be chosen."""

    logits: Floats
    """(S,)"""

    ids: Ids | None = None
    """(S,), rising; None where they are all tokens, (V,)."""


def uniform_stream(seed: int, index: int) -> np.random.Generator:
    """Where the uniform numbers of continuation `index` of a request with `seed` come from, one for each token."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))


def choose(candidates: Candidates, sampling: SamplingConfig, uniform: float) -> int:
    """The next token.

    Args:
        candidates: a superset of the tokens that can be chosen.
        sampling: how to choose.
        uniform: a number in [0, 1), of no meaning where nothing is drawn.

    Raises:
        ValueError: the largest logit is not a finite number.
    """
    logits, ids = candidates
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise ValueError(OVERFLOW)
    if sampling.greedy:
        return best if ids is None else int(ids[best])
    with np.errstate(over="ignore"):  # a temperature near 0 overflows to -inf, which has no weight
        scaled = np.subtract(logits, logits[best], dtype=np.float64) / sampling.temperature
    allowed = _allowed(scaled, sampling)
    sums = np.cumsum(np.exp(scaled if allowed is None else scaled[allowed]))
    # Rounding can lift the target to the sum itself: then the last token with a weight, which is where the sum begins.
    place = sums.searchsorted(min(uniform * sums[-1], np.nextafter(sums[-1], 0)), side="right")
    if allowed is not None:
        place = allowed[place]
    return int(place if ids is None else ids[place])


def _allowed(scaled: Floats, sampling: SamplingConfig) -> npt.NDArray[np.intp] | None:
    """Where the tokens are that may be drawn, rising, with those equal to the last of them; None if all may."""
    least = -np.inf
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        least = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
    if sampling.top_p is not None and sampling.top_p < 1:
        falling = np.sort(scaled[scaled >= least])[::-1]
        sums = np.cumsum(np.exp(falling))
        # A token is allowed if those before it hold less than top_p.
        least = falling[np.searchsorted(sums, sampling.top_p * sums[-1])]
    return np.flatnonzero(scaled >= least) if least > -np.inf else None


def token_logprobs(logits_V: Floats, token: int, n_likeliest: int) -> LogProbs:
    """How probable a token is, and the likeliest ones."""
    wide_V = logits_V.astype(np.float64)
    largest = wide_V.max()
    total = largest + np.log(np.exp(wide_V - largest).sum())
    likeliest = np.argsort(-wide_V, kind="stable")[:n_likeliest].tolist()
    return LogProbs(
        TokenLogProb(token, float(wide_V[token] - total)),
        tuple(TokenLogProb(other, float(wide_V[other] - total)) for other in likeliest),
    )
