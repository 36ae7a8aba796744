"""Looking into a checkpoint: how well it knows a text, and what a prompt makes it do."""

from typing import Literal

from pydantic import Field

from nanomoe.config import Strict
from service.schemas.base import JOB_ID_PATTERN, Percent, View


class ScoreRequest(Strict):
    """The body of `POST /score`."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    """The job whose checkpoint reads the text."""

    checkpoint: Percent | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""

    text: str = Field(min_length=1, max_length=65_536)
    """Any text of two tokens or more."""


class InspectRequest(Strict):
    """The body of `POST /inspect`."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    """The job whose checkpoint reads the prompt."""

    checkpoint: Percent | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""

    prompt: str = Field(min_length=1, max_length=65_536)
    """A text of one token or more; its newest `block_size` tokens are read."""


class PromptToken(View):
    """A token of a text."""

    token: int
    """Its id."""

    text: str
    """What it stands for; U+FFFD where it is part of a character."""

    byte_offset: int
    """Where it begins in the text, in bytes of UTF-8."""


class ScoredToken(PromptToken):
    """A token, and how well it was predicted."""

    loss: float | None
    """-ln of the probability that it was given, in nats; null for the first, which nothing predicts, and where it is
    not finite."""


class CopiedSpan(View):
    """The longest part of the text that stands in the training text word for word; of several the first."""

    text: str
    """The part, in whole characters."""

    n_bytes: int
    """Its bytes of UTF-8."""

    start: int
    """Where it begins in the text, in bytes of UTF-8."""

    training_start: int
    """Where it first begins in the training text, in bytes of UTF-8."""


class ScoreResponse(View):
    """The answer to `POST /score`."""

    job_id: str
    """The job."""

    checkpoint: int
    """The percent that was used."""

    n_tokens: int
    """Tokens of the text; all but the first are predicted."""

    loss: float | None
    """Nats per predicted token, dropout off; a text longer than `block_size` is read in windows, as in training."""

    total_loss: float | None
    """Nats of the whole text."""

    perplexity: float | None
    """exp(loss); null where that is too large for a number."""

    bits_per_byte: float | None
    """Bits per byte of UTF-8 of the predicted tokens: compares models with different tokenizers."""

    tokens: list[ScoredToken]
    """The tokens, in order."""

    copied: CopiedSpan | None
    """Memorised or learned: the longest span shared with the training text; null where not one character is."""


class NextTokenView(View):
    """A token that may come next."""

    token: int
    """Its id."""

    text: str
    """What it stands for; U+FFFD where it is part of a character."""

    probability: float
    """At temperature 1."""


class LayerRoutingView(View):
    """What the router of a mixture of experts says of each token that was read."""

    layer: int
    """The block, from 0."""

    probabilities: list[list[float]]
    """One row for each of `tokens`, one number for each expert. Row t is how token t itself was routed when read,
    whatever comes after it."""


class InspectResponse(View):
    """The answer to `POST /inspect`."""

    job_id: str
    """The job."""

    checkpoint: int
    """The percent that was used."""

    n_unread: int
    """Oldest tokens of the prompt that do not fit into the context."""

    tokens: list[PromptToken]
    """The tokens that were read."""

    likeliest: list[NextTokenView]
    """The ten likeliest next tokens, best first."""

    attention: list[list[list[list[float]]]]
    """By layer, head and token: how much the token takes from each token up to itself. A row sums to 1."""

    routing: list[LayerRoutingView]
    """Of each mixture of experts; empty in a dense model."""
