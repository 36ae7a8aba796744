"""Generation: the request, the plain response, and the events of a stream."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from nanomoe.config import JOB_REFERENCE_PATTERN, Integer, Percent, SamplingConfig, Whole
from service.generation.answers import FinishReason, Timing, TokenLogProb
from service.http.schemas.base import CheckpointRequest, View

TextPrompt = Annotated[str, Field(strict=True, max_length=1_000_000, json_schema_extra={"minLength": 1})]
"""A text to continue. An empty one is refused later, with the error code `empty_prompt`."""

StopString = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]

MAX_STOP_STRINGS = 16
"""Most strings that may end a continuation."""


MAX_TARGETS = 32
"""Most checkpoints that continue one prompt side by side."""


class GenerateTarget(CheckpointRequest):
    """One of the checkpoints that continue a prompt."""


class GenerateRequest(SamplingConfig):
    """The body of `POST /generate`: the checkpoint is named by `job_id` and `checkpoint`, or several by `targets`."""

    job_id: str | None = Field(None, max_length=200, pattern=JOB_REFERENCE_PATTERN)
    """The job whose checkpoint is used: its id, its name, or a unique beginning of its id; null with `targets`."""

    checkpoint: Annotated[Percent, Whole] | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest that is not damaged."""

    targets: list[GenerateTarget] | None = Field(None, min_length=1, max_length=MAX_TARGETS)
    """Checkpoints that continue the prompt side by side, with the same seed, in place of `job_id` and `checkpoint`."""

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

    alternatives: Integer = Field(0, ge=0, le=20)
    """Number of likeliest tokens to answer in the place of each token; needs `logprobs`."""

    stream: bool = False
    """Answer server-sent events instead of one JSON value."""

    @model_validator(mode="after")
    def _one_way_to_name_checkpoints(self) -> Self:
        if (self.job_id is None) == (self.targets is None):
            raise ValueError("name job_id, or targets")
        if self.targets is not None and "checkpoint" in self.model_fields_set:
            raise ValueError("with targets, each has a checkpoint of its own")
        return self

    @property
    def checkpoints(self) -> list[CheckpointRequest]:
        """The checkpoints that are named, in order."""
        if self.targets is not None:
            return [*self.targets]
        assert self.job_id is not None, "validated"
        return [CheckpointRequest(job_id=self.job_id, checkpoint=self.checkpoint)]

    @model_validator(mode="after")
    def _alternatives_of_logprobs(self) -> Self:
        if self.alternatives and not self.logprobs:
            raise ValueError("alternatives are answered with logprobs only")
        return self


class ChosenToken(TokenLogProb):
    """A token that was chosen, and what else was likely in its place."""

    alternatives: list[TokenLogProb] = Field(default_factory=list)
    """The likeliest tokens in its place, best first, which may include itself; as many as were asked for."""


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

    logprobs: list[ChosenToken] | None = None
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
    """`event: end`: usage and timing of a generation, the last event of each target and a part of a plain response."""

    target: int = 0
    """Number of the target, from 0; 0 where there is one."""

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
    """The answer to `POST /generate` of one checkpoint."""

    prompt: str
    """The prompt, as sent."""

    choices: list[Choice]
    """The `n` continuations."""


class GenerateTargetsResponse(View):
    """The answer to `POST /generate` with `targets`."""

    prompt: str
    """The prompt, as sent."""

    seed: int
    """Seed that was used for each target: the same seed gives the same texts again."""

    answers: list[GenerateResponse]
    """What each target answers, in the order of the request, as it would alone with that seed."""


class GenerateChunk(View):
    """`event: chunk`: the part of a continuation that is new since its last chunk."""

    target: int = 0
    """Number of the target, from 0; 0 where there is one."""

    index: int
    """Number of the continuation, 0 to n - 1."""

    text: str
    """New text of the continuation, never cut inside a character."""

    tokens: list[int]
    """The new tokens that begin in the text so far."""

    logprobs: list[ChosenToken] | None = None
    """Log-probability of each new token; null unless asked for."""

    finish_reason: FinishReason | None
    """Whether `max_new_tokens` or a stop string ended the continuation; null until its last chunk."""
