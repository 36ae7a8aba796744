"""Generation: the request, the plain response, and the events of a stream."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from nanomoe.config import JOB_ID_PATTERN, Integer, Percent, Strict, Whole
from service.http.schemas.base import View

TextPrompt = Annotated[str, Field(strict=True, max_length=1_000_000, json_schema_extra={"minLength": 1})]
"""A text to continue. An empty one is refused later, with the error code `empty_prompt`."""

StopString = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]

MAX_STOP_STRINGS = 16
"""Most strings that may end a continuation."""


class GenerateRequest(Strict):
    """The body of `POST /generate`."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    """The job whose checkpoint continues the prompt."""

    checkpoint: Annotated[Percent, Whole] | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""

    prompt: TextPrompt
    """The text to continue."""

    max_new_tokens: Integer = Field(25, ge=1, le=65_536)
    """Tokens of each continuation, at most the server's limit."""

    temperature: float = Field(1.0, ge=0, le=100)
    """Divides the logits before sampling; 0 takes the likeliest token."""

    top_k: Annotated[int, Field(ge=1, le=1_000_000), Whole] | None = None
    """Sample among this many likeliest tokens; null among all."""

    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the likeliest tokens that together hold this much probability; null among all."""

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


class TokenLogProb(View):
    """A token that was chosen, and how probable it was."""

    token: int
    """Id of the token in the vocabulary."""

    text: str
    """Text of the token; U+FFFD where it is part of a character."""

    logprob: float
    """ln of the token's probability under the model's own softmax, at temperature 1."""


class Choice(View):
    """One continuation of the prompt."""

    index: int = 0
    """Number of the continuation, 0 to n - 1."""

    text: str
    """Text that was added to the prompt."""

    tokens: list[int]
    """Token ids of the continuation, up to the last that begins before the text's end."""

    finish_reason: Literal["length", "stop"]
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


class Timing(View):
    """Durations and speed of a generation."""

    queue_seconds: float
    """Seconds from the request's arrival to its first step in the engine."""

    first_token_seconds: float
    """Seconds from the request's arrival to its first token."""

    tok_per_sec: float | None
    """New tokens a second, over all continuations; null when there was nothing to time."""


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

    finish_reason: Literal["length", "stop"] | None
    """Whether `max_new_tokens` or a stop string ended the continuation; null until its last chunk."""
