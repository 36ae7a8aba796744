"""Continuing a prompt: the request, the plain answer, and the pieces of a stream."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from nanomoe.config import Strict
from service.patterns import JOB_ID_PATTERN
from service.schemas.base import Percent, View

TextPrompt = Annotated[str, Field(strict=True, max_length=1_000_000, json_schema_extra={"minLength": 1})]
"""A text to continue. An empty one is refused by name (`empty_prompt`), where it is known why."""

StopString = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]

MAX_STOP_STRINGS = 16
"""Most strings that may end a continuation."""


class GenerateRequest(Strict):
    """The body of `POST /generate`."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    """The job whose checkpoint continues the prompt."""

    checkpoint: Percent | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""

    prompt: TextPrompt
    """The text to continue."""

    max_new_tokens: int = Field(25, ge=1, le=65_536)
    """Tokens of each continuation, at most the server's limit."""

    temperature: float = Field(1.0, ge=0, le=100)
    """Divides the logits before sampling; 0 takes the likeliest token."""

    top_k: int | None = Field(None, ge=1, le=1_000_000)
    """Sample among this many likeliest tokens; null among all."""

    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the likeliest tokens that together hold this much probability; null among all."""

    seed: int | None = Field(None, ge=0, lt=2**63)
    """The same seed gives the same text, whoever else is being served; null draws one."""

    n: int = Field(1, ge=1, le=128)
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
    """Its id."""

    text: str
    """What it stands for; U+FFFD where it is part of a character."""

    logprob: float
    """ln of its probability under the model's own softmax, at temperature 1."""


class Choice(View):
    """One continuation."""

    index: int = 0
    """0 to n - 1."""

    text: str
    """What was added to the prompt."""

    tokens: list[int]
    """Its token ids, up to the last that begins before the text's end."""

    finish_reason: Literal["length", "stop"]
    """Whether `max_new_tokens` or a stop string ended it."""

    logprobs: list[TokenLogProb] | None = None
    """Of each token; null unless asked for."""


class Usage(View):
    """What was counted."""

    prompt_tokens: int
    """Tokens of the prompt."""

    completion_tokens: int
    """Tokens that were generated, in all continuations; those of a stop string count."""

    total_tokens: int
    """Tokens of the prompt and of the continuations together."""


class Timing(View):
    """How long it took."""

    queue_seconds: float
    """From the request's arrival to its first step in the engine."""

    first_token_seconds: float
    """From the request's arrival to its first token."""

    tok_per_sec: float | None
    """New tokens a second, over all continuations; null when there was nothing to time."""


class GenerateEnd(View):
    """What is known of a generation at its end: the last event of a stream, and the rest of a plain answer."""

    job_id: str
    """The job."""

    checkpoint: int
    """The percent that was used."""

    usage: Usage
    """What was counted."""

    timing: Timing
    """How long it took."""

    seed: int
    """The seed that was used: it gives the same texts again."""

    window_slid: bool
    """Whether the context grew past `block_size`, so that its earliest tokens were forgotten."""

    numerics: str
    """How the engine computed."""


class GenerateResponse(GenerateEnd):
    """The answer to `POST /generate`."""

    prompt: str
    """As sent."""

    choices: list[Choice]
    """The `n` continuations."""


class GenerateChunk(View):
    """`event: chunk`: what a continuation has gained since its last chunk."""

    index: int
    """Which of the `n` continuations."""

    text: str
    """Never cut inside a character."""

    tokens: list[int]
    """The new tokens that begin in the text so far."""

    logprobs: list[TokenLogProb] | None = None
    """Of each of `tokens`; null unless asked for."""

    finish_reason: Literal["length", "stop"] | None
    """Set in a continuation's last chunk."""
