"""What a job measured: each checkpoint's figures and files, and the step series."""

from datetime import datetime

from pydantic import ConfigDict, Field, JsonValue

from service.schemas.base import Status, View


class ReconstructedToken(View):
    """One position of the training text: the token that was seen there, the one that follows, and the model's guess."""

    model_config = ConfigDict(extra="allow")

    input: str | None = None
    """Text of the token at this position, which the model saw and routed; U+FFFD where it splits a character. Null in
    checkpoints of earlier versions."""

    target: str
    """Text of the token that follows `input`, which is to be predicted; U+FFFD where it splits a character."""

    predicted: str
    """Text of the token that the model finds likeliest after `input`."""

    loss: float
    """Cross-entropy of the target, in nats."""

    id: int | None = None
    """The target's token id."""

    byte_offset: int | None = None
    """Where the target starts in the text's UTF-8 bytes."""

    experts: list[list[int]] | None = None
    """The experts that `input` was sent to, of each MoE layer, in gate order; null for a dense model."""


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
