"""Evaluation of a checkpoint: the loss of a text, and attention and routing at a prompt."""

from typing import Annotated, Literal

from pydantic import Field

from nanomoe.config import JOB_ID_PATTERN, Percent, Strict, Whole
from service.http.schemas.base import Text, View


class ScoreRequest(Strict):
    """The body of `POST /score`."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    """The job whose checkpoint reads the text."""

    checkpoint: Annotated[Percent, Whole] | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""

    text: Text = Field(min_length=1, max_length=65_536)
    """Any text of two tokens or more. A byte-order mark at its start is dropped, as in a training text."""


class InspectRequest(Strict):
    """The body of `POST /inspect`."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    """The job whose checkpoint reads the prompt."""

    checkpoint: Annotated[Percent, Whole] | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""

    prompt: Annotated[str, Field(max_length=65_536, json_schema_extra={"minLength": 1})]
    """A text of one token or more; its newest `block_size` tokens are read, and nothing is generated."""

    attention: bool = True
    """Whether the response holds the attention weights, which are most of it."""


class PromptToken(View):
    """A token of a text."""

    token: int
    """Id of the token."""

    text: str
    """Text of the token; U+FFFD where it is part of a character."""

    byte_offset: int
    """Where the token begins in the text, in bytes of UTF-8."""


class ScoredToken(PromptToken):
    """A token of the text with its loss."""

    loss: float | None
    """Cross-entropy of the token, in nats; null for the first, which nothing predicts, and where it is not finite."""


class CopiedSpan(View):
    """The longest span of the text that occurs in the training text verbatim; of several the first."""

    text: str
    """Text of the copied span, in complete characters."""

    n_bytes: int
    """Length of the copied span, in bytes of UTF-8."""

    start: int
    """Offset of the copied span in the text, in bytes of UTF-8."""

    training_start: int
    """Offset of its first occurrence in the training text, in bytes of UTF-8."""


class ScoreResponse(View):
    """The answer to `POST /score`."""

    job_id: str
    """Id of the job."""

    checkpoint: int
    """Percent of the checkpoint that was used."""

    n_tokens: int
    """Tokens of the text; all but the first are predicted."""

    loss: float | None
    """Nats per predicted token, dropout off; a text longer than `block_size` is read in windows, as in training."""

    total_loss: float | None
    """Loss of the whole text, in nats."""

    perplexity: float | None
    """exp(loss); null where that is too large for a number."""

    bits_per_byte: float | None
    """Bits per byte of UTF-8 of the predicted tokens: compares models with different tokenizers."""

    tokens: list[ScoredToken]
    """Tokens of the text, in order."""

    copied: CopiedSpan | None
    """Longest span that the text shares with the training text, to tell memorised from learned; null for none."""


class NextTokenView(View):
    """A token that may follow the last one that was read."""

    token: int
    """Id of the token."""

    text: str
    """Text of the token; U+FFFD where it is part of a character."""

    probability: float
    """Probability of the token at temperature 1."""


class LayerRoutingView(View):
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


class InspectResponse(View):
    """The answer to `POST /inspect`."""

    job_id: str
    """Id of the job."""

    checkpoint: int
    """Percent of the checkpoint that was used."""

    n_unread: int
    """Number of the prompt's oldest tokens, which do not fit into the context."""

    tokens: list[PromptToken]
    """The tokens that were read, each of which attends and is routed."""

    likeliest: list[NextTokenView]
    """The ten likeliest tokens to follow the last one that was read, best first."""

    attention: list[list[list[list[float]]]]
    """Attention by layer, head and token: how much the token takes from each token up to itself. A row sums to 1.
    Empty with `attention` false."""

    routing: list[LayerRoutingView]
    """How each mixture of experts routed the tokens that were read; empty in a dense model."""
