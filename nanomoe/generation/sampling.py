"""How the next token is chosen from logits. Knows no model and no device.

With temperature 0 (or top_k 1) it is the likeliest token, ties to the lowest id. Otherwise the logits over the
temperature are cut to the `top_k` likeliest, then to the likeliest that together hold `top_p`, and one uniform number
from the sequence's own stream picks a token: the first, in the order of ids, at which the cumulative softmax of what is
left exceeds it. All sums are float64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanomoe.config import SamplingConfig
from nanomoe.generation.logprobs import LogProbs, TokenLogProb

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]

_LONG = 8192
"""Tokens from which on a row is drawn from by itself, not beside others filled up to its length."""


class Candidates(NamedTuple):
    """Tokens that hold every one which may be chosen."""

    logits: Floats
    """(S,)"""

    ids: Ids | None = None
    """(S,), rising; None where they are all tokens, (V,)."""


def uniform_stream(seed: int, index: int) -> np.random.Generator:
    """Where the uniform numbers of continuation `index` of a request with `seed` come from, one for each token."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))


def choose(rows: Sequence[Candidates], samplings: Sequence[SamplingConfig], uniforms: Sequence[float]) -> list[int]:
    """The next token of each row.

    Args:
        rows: what may be chosen.
        samplings: how.
        uniforms: numbers in [0, 1); those of greedy rows are not looked at.

    Raises:
        ValueError: a row's largest logit is not a finite number.
    """
    places = [0] * len(rows)
    short: list[int] = []
    allowed: dict[int, npt.NDArray[np.intp] | None] = {}
    scaled: dict[int, Floats] = {}
    for n, (row, sampling) in enumerate(zip(rows, samplings, strict=True)):
        places[n] = best = int(row.logits.argmax())
        if not np.isfinite(row.logits[best]):
            raise ValueError("the model's logits overflow float32")
        if sampling.greedy:
            continue
        with np.errstate(over="ignore"):  # a temperature near 0 overflows to -inf, which has no weight
            scaled[n] = (row.logits.astype(np.float64) - float(row.logits[best])) / sampling.temperature
        allowed[n] = kept = _allowed(scaled[n], sampling)
        if kept is not None:
            scaled[n] = scaled[n][kept]
        if len(scaled[n]) < _LONG:
            short.append(n)
        else:
            places[n] = _draw([scaled[n]], [uniforms[n]])[0]
    if short:
        drawn = _draw([scaled[n] for n in short], [uniforms[n] for n in short])
        for n, place in zip(short, drawn, strict=True):
            places[n] = place
    tokens = []
    for n, (row, place) in enumerate(zip(rows, places, strict=True)):
        kept = allowed.get(n)
        at = place if kept is None else int(kept[place])
        tokens.append(at if row.ids is None else int(row.ids[at]))
    return tokens


def _draw(rows: Sequence[Floats], uniforms: Sequence[float]) -> list[int]:
    """A place in each row of log-weights. Rows are filled up to the longest with weights of 0, which changes nothing:
    each is summed up by itself, from its first number on."""
    longest = max(map(len, rows))
    weights_NS = np.full((len(rows), longest), -np.inf)
    for n, row in enumerate(rows):
        weights_NS[n, : len(row)] = row
    sums_NS = np.cumsum(np.exp(weights_NS, out=weights_NS), axis=1)
    targets_N1 = np.multiply(uniforms, sums_NS[:, -1])[:, None]
    # Rounding can lift the target to the sum itself: then the last token with a weight, which is where the sum begins.
    places_N = np.minimum((sums_NS <= targets_N1).sum(1), (sums_NS < sums_NS[:, -1:]).sum(1))
    places: list[int] = places_N.tolist()
    return places


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


def log_probs(logits_V: Floats, token: int, n_likeliest: int) -> LogProbs:
    """How probable a token is, and the likeliest ones."""
    wide_V = logits_V.astype(np.float64)
    largest = wide_V.max()
    total = largest + np.log(np.exp(wide_V - largest).sum())
    likeliest = np.argsort(-wide_V, kind="stable")[:n_likeliest].tolist()
    return LogProbs(
        TokenLogProb(token, float(wide_V[token] - total)),
        tuple(TokenLogProb(other, float(wide_V[other] - total)) for other in likeliest),
    )
