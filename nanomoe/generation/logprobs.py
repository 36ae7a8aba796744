"""Log probabilities of tokens: ln of what the model's own softmax says; temperature, top_k and top_p change nothing."""

from typing import NamedTuple


class TokenLogProb(NamedTuple):
    """A token and how probable it was."""

    token: int
    """Id of the token."""

    logprob: float
    """ln of its probability; not finite where the model's float32 overflows."""


class LogProbs(NamedTuple):
    """What was probable in the place of one token."""

    chosen: TokenLogProb
    """The token that stands there."""

    likeliest: tuple[TokenLogProb, ...]
    """The likeliest tokens, best first, as many as were asked for."""
