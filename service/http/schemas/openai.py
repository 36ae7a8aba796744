"""The OpenAI shapes of `/v1`: completions, models and errors. Docstrings describe how this service treats each
field."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator

from nanomoe.config import SamplingConfig, Strict, Whole
from service.generation.answers import FinishReason
from service.http.schemas.base import View
from service.http.schemas.generation import MAX_STOP_STRINGS, StopString, TextPrompt

MAX_PROMPTS = 2048
"""Most prompts of one request."""


def _kind_of_stop(value: Any) -> str | None:
    return "string" if isinstance(value, str) else "strings" if isinstance(value, Sequence) else None


def _kind_of_prompt(value: Any) -> str | None:
    """The first element of a list decides what the others must be."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, Sequence):
        return None
    first = value[0] if value else ""
    return "texts" if isinstance(first, str) else "token lists" if isinstance(first, Sequence) else "tokens"


Stop = Annotated[
    Annotated[StopString, Tag("string")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("strings")],
    Discriminator(
        _kind_of_stop, custom_error_type="stop", custom_error_message="Input should be a string or a list of strings"
    ),
]

TokenPrompt = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31), Whole]],
    Field(max_length=1_000_000, fail_fast=True, json_schema_extra={"minItems": 1}),
]
"""Token ids of the model's own tokenizer."""

_SEVERAL = Field(max_length=MAX_PROMPTS, fail_fast=True, json_schema_extra={"minItems": 1})

Prompt = Annotated[
    Annotated[TextPrompt, Tag("text")]
    | Annotated[list[TextPrompt], _SEVERAL, Tag("texts")]
    | Annotated[TokenPrompt, Tag("tokens")]
    | Annotated[list[TokenPrompt], _SEVERAL, Tag("token lists")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt",
        custom_error_message="Input should be a string, a list of strings, a list of token ids or a list of those",
    ),
]


class StreamOptions(Strict):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    """Whether a last chunk without choices holds the usage."""


def _accept_null(schema: dict[str, Any]) -> None:
    """Say in the JSON schema of a completion request that its temperature may be null."""
    temperature = schema["properties"]["temperature"]
    bounds = {name: temperature.pop(name) for name in ("type", "minimum", "maximum")}
    temperature["anyOf"] = [bounds, {"type": "null"}]


class CompletionRequest(SamplingConfig):
    """The body of `POST /v1/completions`. Fields that are not listed are ignored, and named in `X-Ignored`.

    `top_k` is not a field of OpenAI's; a `temperature` of null stands for 1.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_accept_null)

    model: str = Field(min_length=1, max_length=204)
    """`JOB_ID@PERCENT`, or `JOB_ID` for its newest checkpoint."""

    prompt: Prompt
    """The text to continue, or its token ids; or a list of up to 2,048 of either, each continued by itself."""

    max_tokens: Annotated[int, Field(ge=0, le=65_536), Whole] | None = None
    """Tokens of each continuation, at most the server's limit; null stands for 16, 0 adds nothing."""

    n: Annotated[int, Field(ge=1, le=128), Whole] | None = None
    """Continuations of each prompt; null stands for 1."""

    stop: Stop | None = None
    """A continuation ends before the first of these strings, of which there may be 16."""

    seed: Annotated[int, Field(ge=0, lt=2**63), Whole] | None = None
    """The same seed gives a prompt the same text, whoever else is being served and whatever prompts stand beside it;
    null draws one for each prompt."""

    echo: bool | None = None
    """Whether the text begins with the prompt, and `logprobs` with the prompt's own."""

    logprobs: Annotated[int, Field(ge=0, le=5), Whole] | None = None
    """How many likeliest tokens to report beside each token of the text; 0 the token alone."""

    stream: bool | None = None
    """Answer server-sent events instead of one JSON value."""

    stream_options: StreamOptions | None = None
    """Options of a streamed response."""

    @field_validator("temperature", mode="before")
    @classmethod
    def _default_temperature(cls, given: object) -> object:
        return SamplingConfig().temperature if given is None else given

    @property
    def several(self) -> bool:
        """Whether `prompt` is a list of prompts, even of one."""
        return isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts: one or more texts or lists of token ids."""
        given: Any = self.prompt
        return given if self.several else [given]

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; empty for none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def ignored(self) -> list[str]:
        """Names of the unknown fields of the request whose value is not null."""
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
    """The tokens of the text, up to the last that begins before the text's end."""

    token_logprobs: list[float | None]
    """The log-probability of each token; null for the first of a prompt, which nothing predicts."""

    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens in each token's place, best first, and the token itself; null where nothing predicts it."""

    text_offset: list[int]
    """Where each token begins in the text, in characters."""


class CompletionChoice(View):
    """One continuation, or, in a stream, the part that is new."""

    index: int
    """The place of the prompt in the list, from 0, times `n`, plus the number of its continuation, from 0."""

    text: str
    """Text that was added to the prompt; with `echo`, the prompt first. Never cut inside a character."""

    logprobs: CompletionLogprobs | None
    """Log-probabilities of the tokens; null unless asked for."""

    finish_reason: FinishReason | None
    """Whether `max_tokens` or a stop string ended it; in a stream null until then."""


class CompletionUsage(View):
    """Token counts of a request."""

    prompt_tokens: int
    """Tokens of all prompts, each counted once."""

    completion_tokens: int
    """Tokens that were generated, in all continuations; those of a stop string count."""

    total_tokens: int
    """Tokens of the prompts and of the continuations together."""


class Completion(View):
    """The answer to `POST /v1/completions`, and each chunk of its stream."""

    id: str
    """Id of the completion, the same in all chunks of a stream."""

    object: Literal["text_completion"] = "text_completion"
    """Type of the object: always `text_completion`."""

    created: int
    """Time of the request, in seconds since 1970."""

    model: str
    """The checkpoint that was used: `JOB_ID@PERCENT`."""

    system_fingerprint: str
    """Begins the SHA-256 of the checkpoint's manifest: it changes with the weights."""

    choices: list[CompletionChoice]
    """The `n` continuations of each prompt, in the order of the prompts."""

    usage: CompletionUsage | None
    """Numbers of tokens; in a stream null, but for the last chunk where `include_usage` asks for it."""


class Model(View):
    """A recorded checkpoint, as OpenAI describes a model."""

    id: str
    """Id of the checkpoint: `JOB_ID@PERCENT`."""

    object: Literal["model"] = "model"
    """Type of the object: always `model`."""

    created: int
    """Time at which the checkpoint was recorded, in seconds since 1970."""

    owned_by: str = "nanomoe"
    """Owner of the model: always `nanomoe`."""


class ModelList(View):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    """Type of the object: always `list`."""

    data: list[Model]
    """The newest jobs' checkpoints first, at most 1,000."""


class OpenAIErrorDetail(View):
    """An error in the shape of OpenAI's."""

    message: str
    """Explanation of the error in one sentence, for people."""

    type: str
    """Kind of the error: `invalid_request_error`, `rate_limit_error` or `server_error`."""

    param: str | None
    """Name of the field that is wrong; null where no single one is."""

    code: str
    """Stable, machine-readable name of the error; the same as in the problems of the other routes."""


class OpenAIError(View):
    """The body of every error under `/v1`."""

    error: OpenAIErrorDetail
    """Description of the error."""
