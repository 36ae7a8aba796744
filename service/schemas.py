"""What goes in and out over HTTP: the requests and answers of every route, as classes shared with the Python client.

Requests are strict and refuse unknown keys. Answers are lenient, so that an older client reads a newer server. Knows no
torch, no FastAPI and no database.
"""

from datetime import datetime
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from nanomoe.config import ConfigWarning, JobConfig, Strict

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})

Percent = Literal[0, 25, 50, 75, 100]

JOB_ID_PATTERN = r"^[0-9a-f]{32}$"
# Names and tags end up in terminals, tables and file names: no control characters.
_PRINTABLE = r"^[^\x00-\x1f\x7f]+$"

JobName = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200, pattern=_PRINTABLE)]
TagKey = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
TagValue = Annotated[str, StringConstraints(strict=True, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Tags = Annotated[dict[TagKey, TagValue], Field(max_length=32, json_schema_extra={"additionalProperties": False})]


class View(BaseModel):
    """A frozen answer. Fields that this version does not know are left out."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


# Requests


class SubmitRequest(Strict):
    """The body of `POST /jobs`."""

    text: str = Field(min_length=1)
    """The training text: 2 tokens or more, at most the server's `max_text_bytes` in UTF-8."""

    name: JobName | None = None
    """What to call the job."""

    tags: Tags = Field(default_factory=dict)
    """Labels to find the job by."""

    config: JobConfig = JobConfig()
    """What to change of the reference run."""

    priority: int = Field(0, ge=-100, le=100)
    """Higher is claimed sooner."""

    run_at: AwareDatetime | None = None
    """Not to be claimed before this time; null is now."""


class JobPatch(Strict):
    """The body of `PATCH /jobs/{id}`. What is left out stays as it is."""

    name: JobName | None = None
    """The new name; null takes the name away."""

    tags: Tags = Field(default_factory=dict)
    """The new tags, instead of all the old ones."""


class GenerateRequest(Strict):
    """The body of `POST /generate`."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    """The job whose checkpoint continues the prompt."""

    checkpoint: Percent | Literal["latest"] = "latest"
    """Percent of a recorded checkpoint, or the newest."""

    prompt: str = Field(min_length=1, max_length=1_000_000)
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

    stop: list[Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]] = Field(
        default=[], max_length=16
    )
    """A continuation ends before the first of these strings."""

    logprobs: bool = False
    """Whether to answer each token's log-probability."""

    stream: bool = False
    """Answer server-sent events instead of one JSON value."""


# Jobs


class Progress(View):
    """How far a job has come."""

    step: int = 0
    """Optimizer steps done."""

    total_steps: int | None = None
    """Optimizer steps planned; null until the text is tokenised."""

    epoch: float = 0
    """Passes over the text done."""

    percent: float = 0
    """0 to 100."""

    tok_per_sec: float | None = None
    """Recent training speed, in tokens a second."""

    eta_seconds: float | None = None
    """Seconds of training left at that speed."""


class ModelSize(View):
    """Parameters of a job's model; null until the vocabulary is known."""

    n_params: int | None = None
    """All of them, the tied output layer counted once."""

    n_active_params: int | None = None
    """Those that one token passes through."""


class TextInfo(View):
    """The training text, without the text."""

    sha256: str
    """Of its UTF-8 bytes."""

    n_bytes: int
    """UTF-8 bytes."""

    n_tokens: int | None = None
    """Tokens; null until it is tokenised."""


class JobError(View):
    """Why a job failed."""

    code: str
    """Stable and machine-readable."""

    message: str
    """For a person, with the figures."""


class Parent(View):
    """The checkpoint that a job started from."""

    job_id: str
    """The job that recorded it."""

    checkpoint: int
    """Its percent."""


class JobView(View):
    """A job."""

    id: str
    """32 hexadecimal digits, sortable by time."""

    name: str | None
    """As submitted or patched."""

    tags: dict[str, str]
    """As submitted or patched."""

    status: Status
    """queued, running or paused; succeeded, failed or cancelled at the end."""

    queue_position: int | None = None
    """Jobs that will be claimed before this one, up to 1,000; null unless queued, and in lists."""

    created_at: datetime
    """When it was submitted."""

    started_at: datetime | None
    """When a worker first claimed it."""

    finished_at: datetime | None
    """When it reached its last status."""

    attempt: int
    """Times a worker claimed it."""

    status_reason: str | None
    """Why it is paused or waiting."""

    priority: int
    """Higher is claimed sooner."""

    run_at: datetime
    """Not to be claimed before this time."""

    execution: dict[str, JsonValue] | None
    """Device, precision, threads and paths, fixed at the first start."""

    progress: Progress
    """How far it has come."""

    config: JobConfig
    """Complete, defaults filled in."""

    model: ModelSize
    """How large the model is."""

    text: TextInfo
    """What it is trained on."""

    warnings: list[ConfigWarning]
    """Legal traps of the config, and what happened on the way."""

    error: JobError | None
    """Why it failed; null unless it did."""

    parent: Parent | None
    """The checkpoint that it started from; null for random weights."""

    @property
    def is_terminal(self) -> bool:
        """Whether the status is the last one."""
        return self.status in TERMINAL


class Estimate(View):
    """The answer to a dry run: what the job would be. Null stands for what is known only once training starts."""

    config: JobConfig
    """Complete, defaults filled in."""

    text: TextInfo
    """What it would be trained on."""

    model: ModelSize
    """How large the model would be."""

    training_bytes: int | None
    """Memory for weights, gradients, optimizer and activations."""

    steps_per_epoch: int | None
    """Optimizer steps of one pass over the text."""

    total_steps: int | None
    """Optimizer steps in all."""

    quarters: dict[int, int]
    """Percent of each checkpoint -> the step after which it is recorded; empty until `total_steps` is known."""

    warnings: list[ConfigWarning]
    """Legal traps of the config."""


T = TypeVar("T")


class Page(View, Generic[T]):
    """One page of a list, newest first."""

    data: list[T]
    """The entries."""

    next_cursor: str | None
    """Ask with `cursor=` for the next page; null at the end."""


class Listing(View, Generic[T]):
    """A list short enough for one page."""

    data: list[T]
    """The entries."""


# Checkpoints and metrics


class ReconstructedToken(View):
    """One target of the training text, and what the model predicts in its place."""

    model_config = ConfigDict(extra="allow")

    target: str
    """The token's text; U+FFFD where it splits a character."""

    predicted: str
    """The likeliest token's text."""

    loss: float
    """Cross-entropy of the target, in nats."""

    id: int | None = None
    """The target's token id."""

    byte_offset: int | None = None
    """Where the target starts in the text's UTF-8 bytes."""

    experts: list[list[int]] | None = None
    """The chosen experts of each MoE layer, in gate order."""


class Reconstruction(View):
    """The model's prediction for every target of the training text, the first 2,048 of them."""

    model_config = ConfigDict(extra="allow")

    text: str
    """The predictions joined."""

    tokens: list[ReconstructedToken] | None = None
    """Null with `?tokens=false`."""

    truncated: bool = False
    """Whether the text has more targets than these."""


class ReconstructionPage(View):
    """A stretch of a reconstruction."""

    job_id: str
    """The job."""

    percent: int
    """The checkpoint."""

    start: int = Field(alias="from", serialization_alias="from")
    """Index of the first of these targets."""

    n_tokens: int
    """Targets recorded in all."""

    truncated: bool
    """Whether the text has more targets than were recorded."""

    data: list[ReconstructedToken]
    """The targets."""

    next_from: int | None
    """Ask with `from=` for the next stretch; null at the end."""

    model_config = ConfigDict(populate_by_name=True)


class Continuation(View):
    """What a checkpoint continues from the text's first tokens."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    """The first `cont_prefix_tokens` tokens of the text."""

    text: str
    """What the model adds."""


class Baselines(View):
    """Loss of simpler predictors on a job's text, in nats per token."""

    uniform: float
    """Knows nothing: ln of the vocabulary's size."""

    unigram: float
    """Knows how often each token is a target."""

    bigram: float
    """Knows that for each preceding token."""


class CheckpointFigures(View):
    """A checkpoint's numbers, measured on the training text with dropout off."""

    model_config = ConfigDict(extra="allow")

    percent: int
    """0, 25, 50, 75 or 100."""

    step: int
    """Optimizer steps before it."""

    epoch: float
    """Passes over the text before it."""

    created_at: datetime
    """When it was recorded."""

    loss: float
    """Cross-entropy, in nats per token; no auxiliary loss mixed in."""

    perplexity: float | None
    """exp(loss); null where that is too large for a number."""

    bits_per_byte: float
    """nats / ln 2 / UTF-8 bytes of the targets: compares across tokenizers."""

    accuracy: float
    """Share of the targets whose likeliest token is right."""

    train_loss: float | None = None
    """The last training step's loss, with dropout on; null at percent 0."""

    tok_per_sec: float | None = None
    """Training speed since the last checkpoint; null at percent 0."""

    val_loss: float | None = None
    """Loss on the held-out tokens; null when `val_fraction` is 0."""

    baselines: Baselines | None = None
    """What simpler predictors would reach on the same text."""

    stopped_early: bool = False
    """Whether `stop_at_perplexity` ended training here."""


class CheckpointMetrics(CheckpointFigures):
    """Everything that was measured at a checkpoint."""

    reconstruction: Reconstruction | None = None
    """How well the model reconstructs the text."""

    continuation: Continuation | None = None
    """What it continues."""

    moe: dict[str, JsonValue] | None = None
    """Routing and balance, per layer; null for a dense model."""


class StepSeries(View):
    """Training steps, column by column; thinned, its minima and maxima are kept."""

    step: list[int]
    """Optimizer step, from 1."""

    train_loss: list[float | None]
    """Loss of the step's batch, with dropout on."""

    lr: list[float | None]
    """Learning rate."""

    grad_norm: list[float | None]
    """Norm of the whole gradient before clipping."""


class Metrics(View):
    """The answer to `GET /jobs/{id}/metrics`."""

    job_id: str
    """The job."""

    status: Status
    """Its status."""

    checkpoints: list[CheckpointMetrics]
    """By percent; the first is the model before training."""

    steps: StepSeries
    """The step series, at most `points` long."""


class FileView(View):
    """A file of a checkpoint."""

    name: str
    """As in `/checkpoints/{percent}/files/{name}`."""

    size: int
    """Bytes."""

    sha256: str
    """Of its bytes."""


class CheckpointView(CheckpointFigures):
    """A recorded checkpoint: its numbers and its files."""

    files: list[FileView]
    """The files that can be downloaded."""


# Generation


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
    """Its token ids."""

    finish_reason: Literal["length", "stop"]
    """Whether `max_new_tokens` or a stop string ended it."""

    logprobs: list[TokenLogProb] | None = None
    """Of each token; null unless asked for."""


class Usage(View):
    """What was counted."""

    prompt_tokens: int
    """Tokens of the prompt."""

    completion_tokens: int
    """Tokens of all continuations."""

    total_tokens: int
    """Both."""


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
    """The new tokens; the text of the last ones may still be held back."""

    logprobs: list[TokenLogProb] | None = None
    """Of each of `tokens`; null unless asked for."""

    finish_reason: Literal["length", "stop"] | None
    """Set in a continuation's last chunk."""


# Events


class StatusEvent(View):
    """`event: status`: how the job stood right after it changed. `step` events are a `Progress`, `checkpoint` events a
    `CheckpointMetrics` without tokens, `warning` events a `ConfigWarning`."""

    status: Status
    """The new status."""

    status_reason: str | None = None
    """Why it is paused or waiting."""

    attempt: int = 0
    """Times a worker had claimed it."""

    error: JobError | None = None
    """Why it failed; null unless it did."""


# The service


class Device(View):
    """What a worker trains on."""

    model_config = ConfigDict(extra="allow")

    device: str
    """`cpu`, or `cuda:N`."""

    name: str | None = None
    """The maker's name of it."""

    memory_bytes: int | None = None
    """All of its memory."""


class WorkerView(View):
    """A worker, as it last reported itself."""

    id: str
    """Of this start of the worker."""

    name: str
    """Stable across starts."""

    host: str
    """The machine's name."""

    pid: int
    """Its process there."""

    devices: list[Device]
    """What it trains on."""

    slots: int
    """Jobs that it trains at once."""

    versions: dict[str, str]
    """Of the code and its libraries."""

    current_jobs: list[str]
    """Ids of the jobs that it owns."""

    started_at: datetime
    """When it started."""

    last_seen_at: datetime
    """Its last sign of life."""

    stopped_at: datetime | None
    """When it said that it stops; null while it runs, or if it never said so."""


class Health(View):
    """The answer to `GET /healthz`."""

    status: Literal["ok"] = "ok"
    """The process answers."""

    version: str
    """Of the service."""


class Readiness(View):
    """The answer to `GET /readyz`."""

    status: Literal["ready"] = "ready"
    """Jobs can be submitted."""

    database: str
    """`sqlite` or `postgresql`."""

    revision: str
    """The schema's revision."""

    n_workers: int
    """Workers seen lately; none are needed to be ready."""


class ProblemError(View):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    """Where: `body`, `query`, `path` or `header`, then the path to the field."""

    msg: str
    """What is wrong there."""


class Problem(View):
    """An error (RFC 9457, `application/problem+json`)."""

    type: str
    """`about:blank`, or an address that names the problem."""

    title: str
    """The status in words."""

    status: int
    """The HTTP status."""

    detail: str
    """What went wrong this time."""

    code: str
    """Stable and machine-readable."""

    errors: list[ProblemError] = []
    """Each thing that is wrong, for an invalid request."""
