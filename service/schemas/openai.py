"""The OpenAI shapes of `/v1`: completions, models and errors. Docstrings say what this service makes of each field."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from nanomoe.config import Strict
from service.schemas.base import View

StopString = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]


class StreamOptions(Strict):
    """What a stream tells beside its text."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    """Whether a last chunk without choices tells what was counted."""


class CompletionRequest(Strict):
    """The body of `POST /v1/completions`. Fields that are not listed are ignored, and named in `X-Ignored`."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1, max_length=100)
    """`JOB_ID@PERCENT`, or `JOB_ID` for its newest checkpoint."""

    prompt: str = Field(min_length=1, max_length=1_000_000)
    """The text to continue."""

    max_tokens: int | None = Field(None, ge=1, le=65_536)
    """Tokens of each continuation, at most the server's limit; null stands for 16."""

    temperature: float | None = Field(None, ge=0, le=100)
    """Divides the logits before sampling; 0 takes the likeliest token; null stands for 1."""

    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the likeliest tokens that together hold this much probability; null among all."""

    top_k: int | None = Field(None, ge=1, le=1_000_000)
    """Sample among this many likeliest tokens; null among all. Not a field of OpenAI's."""

    n: int | None = Field(None, ge=1, le=128)
    """Continuations of the same prompt; null stands for 1."""

    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    """A continuation ends before the first of these strings."""

    seed: int | None = Field(None, ge=0, lt=2**63)
    """The same seed gives the same text, whoever else is being served; null draws one."""

    echo: bool | None = None
    """Whether the text begins with the prompt; not together with `logprobs`."""

    logprobs: int | None = Field(None, ge=0, le=5)
    """How many likeliest tokens to report beside each chosen one."""

    stream: bool | None = None
    """Answer server-sent events instead of one JSON value."""

    stream_options: StreamOptions | None = None
    """What a stream tells beside its text."""

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as what it stands for."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def ignored(self) -> list[str]:
        """Fields that were sent but are not known here; null asks for nothing."""
        unknown = dict(self.model_extra or {})
        if self.stream_options is not None:
            extra = self.stream_options.model_extra or {}
            unknown |= {f"stream_options.{name}": value for name, value in extra.items()}
        return [name for name, value in unknown.items() if value is not None]


class CompletionLogprobs(View):
    """ln of the probabilities under the model's own softmax, at temperature 1; one entry for each token.

    A token that is part of a character is written as OpenAI does: `bytes:\\xc3`.
    """

    tokens: list[str]
    """The chosen tokens."""

    token_logprobs: list[float]
    """Of each chosen token."""

    top_logprobs: list[dict[str, float]]
    """The likeliest tokens in its place, best first, and the chosen one."""

    text_offset: list[int]
    """Where each token begins in the continuation, in characters."""


class CompletionChoice(View):
    """One continuation, or, in a stream, what it has gained."""

    index: int
    """0 to n - 1."""

    text: str
    """What was added to the prompt; with `echo`, the prompt first. Never cut inside a character."""

    logprobs: CompletionLogprobs | None
    """Null unless asked for."""

    finish_reason: Literal["length", "stop"] | None
    """Whether `max_tokens` or a stop string ended it; in a stream null until then."""


class CompletionUsage(View):
    """What was counted."""

    prompt_tokens: int
    """Tokens of the prompt."""

    completion_tokens: int
    """Tokens of all continuations."""

    total_tokens: int
    """Both."""


class Completion(View):
    """The answer to `POST /v1/completions`, and each chunk of its stream."""

    id: str
    """The same in all chunks of a stream."""

    object: Literal["text_completion"] = "text_completion"
    """Always this."""

    created: int
    """Seconds since 1970."""

    model: str
    """The checkpoint that was used: `JOB_ID@PERCENT`."""

    system_fingerprint: str
    """Begins the SHA-256 of the checkpoint's manifest: it changes with the weights."""

    choices: list[CompletionChoice]
    """The `n` continuations."""

    usage: CompletionUsage | None
    """In a stream null, but for the last chunk where `include_usage` asks for it."""


class Model(View):
    """A recorded checkpoint, as OpenAI describes a model."""

    id: str
    """`JOB_ID@PERCENT`."""

    object: Literal["model"] = "model"
    """Always this."""

    created: int
    """When it was recorded, in seconds since 1970."""

    owned_by: str = "nanomoe"
    """Always this."""


class ModelList(View):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    """Always this."""

    data: list[Model]
    """The newest jobs' checkpoints first, at most 1,000."""


class OpenAIErrorDetail(View):
    """What went wrong, as OpenAI says it."""

    message: str
    """One sentence for a person."""

    type: str
    """`invalid_request_error`, `rate_limit_error` or `server_error`."""

    param: str | None
    """The field that is wrong."""

    code: str
    """Stable and machine-readable; the same as in the problems of the other routes."""


class OpenAIError(View):
    """The body of every error under `/v1`."""

    error: OpenAIErrorDetail
    """The error."""
