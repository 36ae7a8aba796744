"""Generation: the request, the plain response, and the events of a stream."""

from typing import Annotated

from pydantic import Field, StringConstraints

from nanomoe.config import Integer, SamplingConfig, Whole
from service.generation.answers import FinishReason, Timing, TokenLogProb
from service.http.schemas.base import CheckpointRequest, View

TextPrompt = Annotated[str, Field(strict=True, max_length=1_000_000, json_schema_extra={"minLength": 1})]
"""A text to continue. An empty one is refused later, with the error code `empty_prompt`."""

StopString = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]

MAX_STOP_STRINGS = 16
"""Most strings that may end a continuation."""


class GenerateRequest(SamplingConfig, CheckpointRequest):
    """The body of `POST /generate`."""

    prompt: TextPrompt
    """The text to continue."""

    max_new_tokens: Integer = Field(25, ge=1, le=65_536)
    """Tokens of each continuation, at most the server's limit."""

    seed: Annotated[int, Field(ge=0, lt=2**63), Whole] | None = None
    """The same seed gives the same text, whoever else is being served; null draws one."""

    n: Integer = Field(1, ge=1, le=128)
    """Continuations of the same prompt, at most the server's limit."""

    stop: list[StopString] = Field(default=[], max_length=MAX_STOP_STRINGS)
    """A continuation ends before the first of these strings."""

    logprobs: bool = False
    """Whether to answer each token's log-probability."""

    stream: bool = False
    """Answer server-sent events instead of one JSON value."""


class Choice(View):
    """One continuation of the prompt."""

    index: int = 0
    """Number of the continuation, 0 to n - 1."""

    text: str
    """Text that was added to the prompt."""

    tokens: list[int]
    """Token ids of the continuation, up to the last that begins before the text's end."""

    finish_reason: FinishReason
    """Whether `max_new_tokens` or a stop string ended it."""

    logprobs: list[TokenLogProb] | None = None
    """Log-probability of each token; null unless asked for."""


class Usage(View):
    """Token counts of a request."""

    prompt_tokens: int
    """Tokens of the prompt."""

    completion_tokens: int
    """Tokens that were generated, in all continuations; those of a stop string count."""

    total_tokens: int
    """Tokens of the prompt and of the continuations together."""


class GenerateEnd(View):
    """`event: end`: usage and timing of a generation, the last event of a stream and a part of a plain response."""

    job_id: str
    """Id of the job."""

    checkpoint: int
    """Percent of the checkpoint that was used."""

    usage: Usage
    """Token counts of the prompt and the continuations."""

    timing: Timing
    """Durations and speed of the generation."""

    seed: int
    """Seed that was used: the same seed gives the same texts again."""

    window_slid: bool
    """Whether the context grew past `block_size`, so that its earliest tokens were forgotten."""

    numerics: str
    """Numerics of the engine: device, precision and kernels."""


class GenerateResponse(GenerateEnd):
    """The answer to `POST /generate`."""

    prompt: str
    """The prompt, as sent."""

    choices: list[Choice]
    """The `n` continuations."""


class GenerateChunk(View):
    """`event: chunk`: the part of a continuation that is new since its last chunk."""

    index: int
    """Number of the continuation, 0 to n - 1."""

    text: str
    """New text of the continuation, never cut inside a character."""

    tokens: list[int]
    """The new tokens that begin in the text so far."""

    logprobs: list[TokenLogProb] | None = None
    """Log-probability of each new token; null unless asked for."""

    finish_reason: FinishReason | None
    """Whether `max_new_tokens` or a stop string ended the continuation; null until its last chunk."""
