"""Evaluation of a checkpoint: the loss of a text, and attention and routing at a prompt."""

from typing import Annotated

from pydantic import Field

from service.generation.answers import LayerRoutingView, NextTokenView, PromptToken
from service.http.schemas.base import CheckpointRequest, Text, View


class ScoreRequest(CheckpointRequest):
    """The body of `POST /score`."""

    text: Text = Field(min_length=1, max_length=65_536)
    """Any text of two tokens or more. A byte-order mark at its start is dropped, as in a training text."""


class InspectRequest(CheckpointRequest):
    """The body of `POST /inspect`."""

    prompt: Annotated[str, Field(max_length=65_536, json_schema_extra={"minLength": 1})]
    """A text of one token or more; its newest `block_size` tokens are read, and nothing is generated."""

    attention: bool = True
    """Whether the response holds the attention weights, which are most of it."""


class ScoredToken(PromptToken):
    """A token of the text with its loss."""

    loss: float | None
    """Cross-entropy of the token, in nats; null for the first, which nothing predicts, and where it is not finite."""


class RoutedToken(PromptToken):
    """A token that was read, and the experts that it was sent to."""

    experts: list[list[int]]
    """The chosen experts of each MoE layer, in gate order; the layers are those of `routing`, in the same order."""

    gates: list[list[float]]
    """The weight of each chosen expert's output, in the same order."""


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

    routed_tokens: list[RoutedToken] = Field(default_factory=list)
    """The same choices, token by token: where every token that was read went; empty in a dense model."""
