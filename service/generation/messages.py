"""The messages between the API and its generation engine: one JSON object a line, over the engine's stdin and stdout.

Times are the machine's monotonic clock, in seconds, which both processes share. Knows neither of them, and no torch.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from nanomoe.config import SamplingConfig, Strict
from nanomoe.logs import LogFormat
from nanomoe.store.cache import CacheAddress
from service.generation.answers import FinishReason, LayerRoutingView, NextTokenView, PromptToken, TokenLogProb


class EngineRequest(Strict):
    """Continuations of one prompt from one recorded checkpoint, within the server's limits."""

    folder: str
    """Absolute path of the checkpoint, or its URL in a bucket."""

    manifest_sha256: str
    """SHA-256 of the recorded manifest, which holds the SHA-256 of every file."""

    prompt: str | tuple[int, ...]
    """The text to continue, or its token ids; not empty."""

    max_new_tokens: int
    """Tokens of each continuation, at least 1."""

    sampling: SamplingConfig = SamplingConfig()
    """How each token is chosen."""

    seed: int = 0
    """The same seed gives the same continuations."""

    n: int = 1
    """Number of continuations."""

    stop: tuple[str, ...] = ()
    """A continuation ends before the first of these strings."""

    logprobs: int | None = None
    """How many likeliest tokens to report beside each chosen one; 0 the chosen one alone, None nothing."""


# -- To the engine ----------------------------------------------------------------------------------------------------


class EngineStart(Strict):
    """The first line that an engine reads."""

    type: Literal["start"] = "start"
    parent: int
    """The process that the engine must not outlive."""

    device: str
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    cache_bytes: int
    """Bytes of loaded checkpoints to keep."""

    max_running: int
    """Continuations generated at the same time."""

    log_format: LogFormat = "console"
    """How the engine writes log lines to standard error."""

    files: CacheAddress | None = None
    """Where files of a bucket are kept that are read; null where the store is a folder."""


class Generate(Strict):
    """A request to continue a prompt."""

    type: Literal["generate"] = "generate"
    id: int
    """Id of the request, chosen by the API and never used twice."""

    stream: bool
    """Whether chunks are wanted while the text grows, or one for each continuation at its end."""

    request: EngineRequest


class Score(Strict):
    """A question: the loss of each token of a text."""

    type: Literal["score"] = "score"
    id: int
    folder: str
    """Absolute path of the checkpoint, or its URL in a bucket."""

    manifest_sha256: str
    text: str


class Inspect(Strict):
    """A question: the next tokens, attention and routing that a prompt leads to."""

    type: Literal["inspect"] = "inspect"
    id: int
    folder: str
    """Absolute path of the checkpoint, or its URL in a bucket."""

    manifest_sha256: str
    prompt: str
    attention: bool = True
    """Whether attention weights are wanted."""


class ReadPrompts(Strict):
    """A question: the tokens of prompts, and the log-probability of each."""

    type: Literal["read_prompts"] = "read_prompts"
    id: int
    folder: str
    """Absolute path of the checkpoint, or its URL in a bucket."""

    manifest_sha256: str
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts or token ids, none of them empty."""

    logprobs: int | None
    """How many likeliest tokens to report beside each token; 0 the token alone, None nothing."""


class Cancel(Strict):
    """The cancellation of a request. It is not answered."""

    type: Literal["cancel"] = "cancel"
    id: int


# -- From the engine --------------------------------------------------------------------------------------------------


class EngineReady(Strict):
    """The engine's first line: its device works, and it reads requests."""

    type: Literal["ready"] = "ready"


class Begun(Strict):
    """A request has left the queue."""

    type: Literal["begun"] = "begun"
    id: int
    at: float
    """When its first step began."""


class TokenBytesLogProb(TokenLogProb):
    """A token, its bytes, and its log-probability."""

    utf8: str
    """Bytes of the token, in hexadecimal."""


class LogProbsWithBytes(Strict):
    """The log-probability of a token, and the likeliest tokens in its place, each with its text and its bytes."""

    chosen: TokenBytesLogProb
    likeliest: tuple[TokenBytesLogProb, ...]
    """The likeliest tokens, best first."""


class Chunk(Strict):
    """What a continuation has gained since its last chunk."""

    type: Literal["chunk"] = "chunk"
    id: int
    index: int
    """Number of the continuation, from 0."""

    text: str
    """New text, never cut inside a character, and nothing of a stop string."""

    tokens: tuple[int, ...]
    """The new tokens that begin in the text so far."""

    logprobs: tuple[LogProbsWithBytes, ...] | None
    """One for each of `tokens`, if asked for."""

    finish_reason: FinishReason | None
    """Set in a continuation's last chunk."""


class EngineDone(Strict):
    """The last message about a request that was generated."""

    type: Literal["done"] = "done"
    id: int
    prompt_tokens: int
    completion_tokens: int
    """Tokens that were generated, in all continuations; those of a stop string count."""

    window_slid: bool
    """Whether some token was chosen without seeing the oldest ones."""

    numerics: str
    """How tokens were computed, in words."""

    first_token_at: float
    finished_at: float
    n_cached: int
    """Checkpoints that the engine keeps loaded."""

    cache_bytes: int
    """Bytes of the checkpoints that the engine keeps loaded."""


class Scored(Strict):
    """The answer to a `Score`."""

    type: Literal["scored"] = "scored"
    id: int
    tokens: list[PromptToken]
    losses: tuple[float | None, ...]
    """Loss of every token but the first, in nats; None for what is not finite."""


class PromptTokenLogProbs(Strict):
    """A token of a prompt."""

    utf8: str
    """Bytes of the token, in hexadecimal."""

    logprobs: LogProbsWithBytes | None
    """What was probable in its place, if asked for; None for the first, which nothing predicts, and where that is not
    finite."""


class PromptsRead(Strict):
    """The answer to a `ReadPrompts`."""

    type: Literal["prompts_read"] = "prompts_read"
    id: int
    prompts: tuple[tuple[PromptTokenLogProbs, ...], ...]
    """The tokens of each prompt."""


class Inspected(Strict):
    """The answer to an `Inspect`."""

    type: Literal["inspected"] = "inspected"
    id: int
    n_unread: int
    """Oldest tokens of the prompt that do not fit into the context."""

    tokens: list[PromptToken]
    """The tokens that were read."""

    likeliest: list[NextTokenView]
    """The likeliest tokens to follow, best first."""

    attention: list[list[list[list[float]]]]
    """By layer, head and token: what the token takes from each token up to itself; empty where it was not wanted."""

    routing: list[LayerRoutingView]
    """How each mixture of experts routed the tokens that were read."""


class Refused(Strict):
    """The last message about a request that this checkpoint cannot answer: the fault is the request's."""

    type: Literal["refused"] = "refused"
    id: int
    code: str
    """Stable and machine-readable."""

    message: str
    place: tuple[int, ...] | None = None
    """Where the fault lies in what was asked: the token, from 0; of several prompts the prompt first."""


class Failed(Strict):
    """The last message about a request that failed: the fault is the checkpoint's or the engine's."""

    type: Literal["failed"] = "failed"
    id: int
    code: str
    """Stable and machine-readable."""

    message: str


Question = Score | Inspect | ReadPrompts
Examined = Scored | Inspected | PromptsRead
ToEngine = Generate | Question | Cancel
FromEngine = EngineReady | Begun | Chunk | EngineDone | Examined | Refused | Failed

_to_engine: TypeAdapter[ToEngine] = TypeAdapter(Annotated[ToEngine, Field(discriminator="type")])
_from_engine: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="type")])


def parse_to_engine(line: bytes) -> ToEngine:
    """The message in a line that the API wrote, after the first."""
    return _to_engine.validate_json(line)


def parse_from_engine(line: bytes) -> FromEngine:
    """The message in a line that the engine wrote."""
    return _from_engine.validate_json(line)


def to_line(message: Strict) -> bytes:
    """A message as one line of JSON."""
    return message.model_dump_json().encode() + b"\n"
