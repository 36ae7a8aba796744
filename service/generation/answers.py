"""The parts of an answer of generation, declared once: the engine's messages carry them, and HTTP answers hold them.

Lenient, so that an older client reads a newer server. Knows no HTTP, no torch and no process.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["length", "stop"]
"""What ended a continuation: its number of new tokens, or a stop string."""


class AnswerPart(BaseModel):
    """A frozen part of an answer. Fields that this version does not know are left out."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Timing(AnswerPart):
    """Durations and speed of a generation."""

    queue_seconds: float
    """Seconds from the request's arrival to its first step in the engine."""

    first_token_seconds: float
    """Seconds from the request's arrival to its first token."""

    tok_per_sec: float | None
    """New tokens a second, over all continuations; null when there was nothing to time."""


class TokenLogProb(AnswerPart):
    """A token that was chosen, and how probable it was."""

    token: int
    """Id of the token in the vocabulary."""

    text: str
    """Text of the token; U+FFFD where it is part of a character."""

    logprob: float
    """ln of the token's probability under the model's own softmax, at temperature 1."""


class PromptToken(AnswerPart):
    """A token of a text."""

    token: int
    """Id of the token."""

    text: str
    """Text of the token; U+FFFD where it is part of a character."""

    byte_offset: int
    """Where the token begins in the text, in bytes of UTF-8."""


class NextTokenView(AnswerPart):
    """A token that may follow the last one that was read."""

    token: int
    """Id of the token."""

    text: str
    """Text of the token; U+FFFD where it is part of a character."""

    probability: float
    """Probability of the token at temperature 1."""


class LayerRoutingView(AnswerPart):
    """How a mixture of experts routed each token that was read.

    Row t of every table belongs to `tokens[t]`, the token that was read and sent to experts; what these say of it goes
    into the prediction of the token that follows.
    """

    layer: int
    """Index of the block, from 0."""

    logits: list[list[float]]
    """The router's logits: one row a token, one number an expert."""

    probabilities: list[list[float]]
    """The logits as probabilities, by `router_score`: one row a token, one number an expert; a row sums to 1."""

    chosen: list[list[int]]
    """The k experts that each token was sent to, in gate order."""

    gates: list[list[float]]
    """The weights of the outputs of the chosen experts, in the same order."""

    balance_bias: list[float] | None
    """What is added to each expert's score for choosing only, the same for all tokens; null with
    `router_bias_update_rate` 0."""

    n_shared_experts: int
    """Experts that see every token whatever the router says, with gate 1."""
