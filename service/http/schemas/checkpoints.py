"""What a job measured: each checkpoint's figures and files, and the step series."""

from datetime import datetime

from pydantic import ConfigDict, Field

from service.http.schemas.base import View
from service.jobs.statuses import Status


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
    """Id of the target token in the vocabulary."""

    byte_offset: int | None = None
    """Where the target starts in the text's UTF-8 bytes."""

    experts: list[list[int]] | None = None
    """The experts that `input` was sent to, of each MoE layer, in gate order; null for a dense model."""


class Reconstruction(View):
    """The model's prediction for every target of the training text, the first 2,048 of them."""

    model_config = ConfigDict(extra="allow")

    text: str
    """The predicted tokens, joined."""

    tokens: list[ReconstructedToken] | None = None
    """Each target with the prediction; null with `?tokens=false`."""

    truncated: bool = False
    """Whether the text has more targets than are recorded."""


class ReconstructionPage(View):
    """A stretch of a reconstruction."""

    job_id: str
    """Id of the job."""

    percent: int
    """Percent of the checkpoint."""

    start: int = Field(alias="from", serialization_alias="from")
    """Index of the first target on this page."""

    n_tokens: int
    """Number of targets that are recorded."""

    truncated: bool
    """Whether the text has more targets than were recorded."""

    data: list[ReconstructedToken]
    """Targets on this page, with the predictions."""

    next_from: int | None
    """Value of `from` that asks for the next page; null at the end."""

    model_config = ConfigDict(populate_by_name=True)


class Continuation(View):
    """What a checkpoint continues from the first tokens of the training text."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    """The first `cont_prefix_tokens` tokens of the text."""

    text: str
    """The text that the model adds to the prompt."""


class Baselines(View):
    """Losses of simpler predictors on a job's text, in nats per token."""

    uniform: float
    """Loss of a predictor that knows nothing: ln of the vocabulary's size."""

    unigram: float
    """Loss of a predictor that knows only how often each token stands in the text."""

    bigram: float
    """Loss of a predictor that knows how often each token follows the one before it."""


class CheckpointFigures(View):
    """A checkpoint's numbers, measured on the training text with dropout off."""

    model_config = ConfigDict(extra="allow")

    percent: int
    """Percent of the checkpoint: 0, 25, 50, 75 or 100."""

    step: int
    """Optimizer steps before the checkpoint."""

    epoch: float
    """Passes over the text before the checkpoint."""

    created_at: datetime
    """Time at which the checkpoint was recorded."""

    loss: float
    """Cross-entropy in nats per token of these weights on the training text: dropout off, float32, no auxiliary loss
    mixed in. Whoever loads the weights can compute it again."""

    perplexity: float | None
    """exp(`loss`): as uncertain as a choice among so many equally likely tokens; null where that is too large for a
    number."""

    bits_per_byte: float
    """`loss` in bits per byte of UTF-8: compares models with different tokenizers."""

    accuracy: float
    """Share of the targets that the model guesses right, 0 to 1."""

    train_loss: float | None = None
    """Loss of the last training step, dropout on; null at percent 0. The series in `steps` holds this one, never
    `loss`."""

    tok_per_sec: float | None = None
    """Training speed since the checkpoint before, in tokens a second; null at percent 0."""

    val_loss: float | None = None
    """Loss of the tokens held out; null when `val_fraction` is 0."""

    baselines: Baselines | None = None
    """Losses of simpler predictors on the same text, to compare `loss` with: ln V (`uniform`), and the entropies of the
    text's own `unigram` and `bigram` counts."""

    stopped_early: bool = False
    """Whether `stop_at_perplexity` ended training here, before its last step."""


class MixtureFigures(View):
    """What a router does with the tokens of the training text, in single numbers.

    With n_e the assignments of expert e, T tokens, E experts and K experts per token.
    """

    model_config = ConfigDict(extra="allow")

    load_cv: float | None = None
    """Standard deviation of n_e over its mean: 0 in perfect balance."""

    max_violation: float | None = None
    """How far the busiest expert is above its share: 0.5 is half as much again."""

    load_entropy: float | None = None
    """Entropy of `load` over ln E: 1 balanced, towards 0 collapsed."""

    router_entropy: float | None = None
    """Entropy of a token's router probabilities over ln E, on average: near 1 the router is undecided, near 0 it has no
    doubt."""

    dead_experts: int | float | None = None
    """Experts with less than a tenth of their share."""

    dropped_fraction: float | None = None
    """Share of the assignments that `capacity_factor` would drop."""

    unrouted_fraction: float | None = None
    """Share of the tokens all of whose choices would be dropped."""

    churn: float | None = None
    """Share of the choices that differ from the checkpoint before: how stable each token's experts are; null at percent
    0."""

    aux_loss: float | None = None
    """Load-balance loss before its coefficient; never part of `loss`."""

    z_loss: float | None = None
    """Router z-loss before its coefficient; never part of `loss`."""

    train_dropped_fraction: float | None = None
    """Share of the assignments that training dropped since the checkpoint before; null at percent 0."""

    router_grad_norm: float | None = None
    """Norm of the gradient that the cross-entropy gives the router: 0 means that it cannot learn."""


class CardToken(View):
    """A token that an expert was often given."""

    token: str
    """Text of the token."""

    id: int
    """Id of the token."""

    times: int
    """How often the token was routed to the expert."""


class MixtureLayer(MixtureFigures):
    """What the router of one MoE layer does, expert by expert too."""

    layer: int
    """The block, from 0."""

    load: list[float] | None = None
    """n_e / (T K) of each expert: 1 / E when all work equally."""

    importance: list[float] | None = None
    """Mean probability that the router gives each expert."""

    loss_without: list[float] | None = None
    """`loss` when that expert says nothing: a busy expert need not be an important one; null for many experts."""

    cards: list[list[CardToken]] | None = None
    """Tokens that each expert was given most often, the most frequent first."""


class MixtureMetrics(View):
    """How the experts of a model share the work."""

    model_config = ConfigDict(extra="allow")

    layers: list[MixtureLayer]
    """One entry an MoE layer, in the order of the blocks."""

    mean: MixtureFigures
    """Mean of each figure over the layers."""

    max: MixtureFigures
    """Largest of each figure over the layers."""


class CheckpointMetrics(CheckpointFigures):
    """Everything that was measured at a checkpoint."""

    reconstruction: Reconstruction | None = None
    """The model's likeliest token at every position of the text, with the target and its loss. An untrained model
    mostly repeats the token that it reads, because its input and output layers share their weights."""

    continuation: Continuation | None = None
    """`cont_max_new_tokens` tokens after the first `cont_prefix_tokens` of the text; shown with │ where these end."""

    moe: MixtureMetrics | None = None
    """How the experts of each MoE layer share the work; null for a dense model."""


class StepSeries(View):
    """Training steps, column by column; thinned, its minima and maxima are kept."""

    step: list[int]
    """Number of each optimizer step, from 1."""

    train_loss: list[float | None]
    """Loss of each step's batch, with dropout on, in nats per token."""

    lr: list[float | None]
    """Learning rate of each step."""

    grad_norm: list[float | None]
    """Norm of each step's whole gradient, before clipping."""


class Metrics(View):
    """The answer to `GET /jobs/{id}/metrics`."""

    job_id: str
    """Id of the job."""

    status: Status
    """Status of the job."""

    checkpoints: list[CheckpointMetrics]
    """The recorded checkpoints by percent; the first is the model before training."""

    steps: StepSeries
    """The step series, thinned to at most `points` steps."""


class FileView(View):
    """A file of a checkpoint."""

    name: str
    """Name of the file, as in `/checkpoints/{percent}/files/{name}`."""

    size: int
    """Size of the file in bytes."""

    sha256: str
    """SHA-256 of the file, hexadecimal."""


class CheckpointView(CheckpointFigures):
    """A recorded checkpoint: its numbers and its files."""

    files: list[FileView]
    """The files that can be downloaded."""
