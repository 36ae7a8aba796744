"""What the API and its generation engine say to each other: one JSON object a line, over the engine's stdin and stdout.

Times are the machine's monotonic clock, in seconds, which both processes share. Knows neither of them, and no torch.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from nanomoe.config import Strict

FinishReason = Literal["length", "stop"]


class EngineRequest(Strict):
    """Continuations of one prompt from one recorded checkpoint. The API has checked the limits."""

    folder: str
    """Absolute path of the checkpoint."""

    manifest_sha256: str
    """Of the manifest that was recorded: what vouches for every byte."""

    prompt: str
    """The text to continue, not empty."""

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
    """The new tokens; the text of the last ones may still be held back."""

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
    """Of all continuations."""

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
    """Of every token but the first, in nats; None for what is not finite."""


class NextToken(Strict):
    """A token that may come next."""

    token: int
    text: str
    """What it stands for; U+FFFD where it is part of a character."""

    probability: float


class LayerRouting(Strict):
    """What the router of one mixture of experts says of each token that was read."""

    layer: int
    probabilities: tuple[tuple[float, ...], ...]
    """One row a token, one number an expert."""


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
    """By layer, head and token: what the token takes from each token up to itself."""

    routing: tuple[LayerRouting, ...]


class Refused(Strict):
    """The last line of a request that asks for what cannot be."""

    type: Literal["refused"] = "refused"
    id: int
    code: str
    """Stable and machine-readable."""

    message: str


class Failed(Strict):
    """The last line of a request that cannot be served."""

    type: Literal["failed"] = "failed"
    id: int
    code: str
    """Stable and machine-readable."""

    message: str


Question = Score | Inspect
Examined = Scored | Inspected
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
