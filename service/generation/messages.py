"""What the API and its generation engine say to each other: one JSON object a line, over the engine's stdin and stdout.

Times are the machine's monotonic clock, in seconds, which both processes share. Knows neither of them, and no torch.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from nanomoe.config import Strict
from service.logs import LogFormat

FinishReason = Literal["length", "stop"]


class EngineRequest(Strict):
    """Continuations of one prompt from one recorded checkpoint. The API has checked the limits."""

    folder: str
    """Absolute path of the checkpoint."""

    manifest_sha256: str
    """SHA-256 of the recorded manifest, which vouches for every byte."""

    prompt: str | tuple[int, ...]
    """The text to continue, or its token ids; not empty."""

    max_new_tokens: int
    """Tokens of each continuation, at least 1."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""

    top_k: int | None = None
    """Sample among this many likeliest tokens; None among all."""

    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this much probability; None among all."""

    seed: int = 0
    """The same seed gives the same texts."""

    n: int = 1
    """Continuations."""

    stop: tuple[str, ...] = ()
    """A continuation ends before the first of these strings."""

    logprobs: int | None = None
    """How many likeliest tokens to report beside each chosen one; 0 the chosen one alone, None nothing."""


class TokenLogProb(Strict):
    """A token and ln of its probability under the model's own softmax, at temperature 1."""

    token: int
    text: str
    """What it stands for; U+FFFD where it is part of a character."""

    utf8: str
    """Its bytes, in hexadecimal."""

    logprob: float


class LogProbs(Strict):
    """What was probable where a token was chosen."""

    chosen: TokenLogProb
    likeliest: tuple[TokenLogProb, ...]
    """Best first."""


# -- To the engine ----------------------------------------------------------------------------------------------------


class Start(Strict):
    """The first line."""

    type: Literal["start"] = "start"
    parent: int
    """The process that the engine must not outlive."""

    device: str
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    cache_bytes: int
    """Bytes of loaded checkpoints to keep."""

    max_running: int
    """Sequences generated at the same time."""

    log_format: LogFormat = "console"
    """How the engine writes log lines to standard error."""


class Generate(Strict):
    """A request."""

    type: Literal["generate"] = "generate"
    id: int
    """Chosen by the API, never used twice."""

    stream: bool
    """Whether chunks are wanted while the text grows, or one for each continuation at its end."""

    request: EngineRequest


class Score(Strict):
    """How a checkpoint reads a text."""

    type: Literal["score"] = "score"
    id: int
    folder: str
    """Absolute path of the checkpoint."""

    manifest_sha256: str
    text: str


class Inspect(Strict):
    """What a checkpoint does with a prompt."""

    type: Literal["inspect"] = "inspect"
    id: int
    folder: str
    """Absolute path of the checkpoint."""

    manifest_sha256: str
    prompt: str
    attention: bool = True
    """Whether attention weights are wanted."""


class ReadPrompts(Strict):
    """The tokens of prompts, and how likely each was to a checkpoint."""

    type: Literal["read_prompts"] = "read_prompts"
    id: int
    folder: str
    """Absolute path of the checkpoint."""

    manifest_sha256: str
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts or token ids, none of them empty."""

    logprobs: int | None
    """How many likeliest tokens to report beside each token; 0 the token alone, None nothing."""


class Cancel(Strict):
    """Nobody waits for a request any more. Nothing is answered."""

    type: Literal["cancel"] = "cancel"
    id: int


# -- From the engine --------------------------------------------------------------------------------------------------


class Ready(Strict):
    """The device is there, and requests will be answered."""

    type: Literal["ready"] = "ready"


class Begun(Strict):
    """A request has left the queue."""

    type: Literal["begun"] = "begun"
    id: int
    at: float
    """When its first step began."""


class Chunk(Strict):
    """What a continuation has gained since its last chunk."""

    type: Literal["chunk"] = "chunk"
    id: int
    index: int
    """Which of the request's continuations, from 0."""

    text: str
    """Never cut inside a character, and nothing of a stop string."""

    tokens: tuple[int, ...]
    """The new tokens that begin in the text so far."""

    logprobs: tuple[LogProbs, ...] | None
    """One for each of `tokens`, if asked for."""

    finish_reason: FinishReason | None
    """Set in a continuation's last chunk."""


class Done(Strict):
    """The last line of a request."""

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
    """Their bytes."""


class ReadToken(Strict):
    """A token of a text."""

    token: int
    text: str
    """What it stands for; U+FFFD where it is part of a character."""

    byte_offset: int
    """Where it begins in the text, in bytes of UTF-8."""


class Scored(Strict):
    """The last line of a `Score`."""

    type: Literal["scored"] = "scored"
    id: int
    tokens: tuple[ReadToken, ...]
    losses: tuple[float | None, ...]
    """Loss of every token but the first, in nats; None for what is not finite."""


class PromptToken(Strict):
    """A token of a prompt."""

    utf8: str
    """Its bytes, in hexadecimal."""

    logprobs: LogProbs | None
    """What was probable in its place, if asked for; None for the first, which nothing predicts, and where that is not
    finite."""


class PromptsRead(Strict):
    """The last line of a `ReadPrompts`."""

    type: Literal["prompts_read"] = "prompts_read"
    id: int
    prompts: tuple[tuple[PromptToken, ...], ...]
    """The tokens of each."""


class NextToken(Strict):
    """A token that may come next."""

    token: int
    text: str
    """What it stands for; U+FFFD where it is part of a character."""

    probability: float


class LayerRouting(Strict):
    """How one mixture of experts routed each token that was read; a row of a table is one token."""

    layer: int
    logits: tuple[tuple[float, ...], ...]
    """One number an expert."""

    probabilities: tuple[tuple[float, ...], ...]
    """One number an expert."""

    chosen: tuple[tuple[int, ...], ...]
    """The experts that the token was sent to, in gate order."""

    gates: tuple[tuple[float, ...], ...]
    """The weights of their outputs."""

    balance_bias: tuple[float, ...] | None
    """One number an expert, the same for all tokens; None where the config has none."""

    n_shared_experts: int


class Inspected(Strict):
    """The last line of an `Inspect`."""

    type: Literal["inspected"] = "inspected"
    id: int
    n_unread: int
    """Oldest tokens of the prompt that do not fit into the context."""

    tokens: tuple[ReadToken, ...]
    """Those that were read."""

    likeliest: tuple[NextToken, ...]
    """Best first."""

    attention: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]
    """By layer, head and token: what the token takes from each token up to itself; empty where it was not wanted."""

    routing: tuple[LayerRouting, ...]


class Refused(Strict):
    """The last line of a request that asks for what cannot be."""

    type: Literal["refused"] = "refused"
    id: int
    code: str
    """Stable and machine-readable."""

    message: str
    place: tuple[int, ...] | None = None
    """Where the fault lies in what was asked: the token, from 0; of several prompts the prompt first."""


class Failed(Strict):
    """The last line of a request that cannot be served."""

    type: Literal["failed"] = "failed"
    id: int
    code: str
    """Stable and machine-readable."""

    message: str


Question = Score | Inspect | ReadPrompts
Examined = Scored | Inspected | PromptsRead
ToEngine = Generate | Question | Cancel
FromEngine = Ready | Begun | Chunk | Done | Examined | Refused | Failed

_to_engine: TypeAdapter[ToEngine] = TypeAdapter(Annotated[ToEngine, Field(discriminator="type")])
_from_engine: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="type")])


def parse_to_engine(line: bytes) -> ToEngine:
    """A line that the API wrote, after the first."""
    return _to_engine.validate_json(line)


def parse_from_engine(line: bytes) -> FromEngine:
    """A line that the engine wrote."""
    return _from_engine.validate_json(line)


def to_line(message: Strict) -> bytes:
    """The line of a message."""
    return message.model_dump_json().encode() + b"\n"
