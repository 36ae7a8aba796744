"""The metrics of a checkpoint: what its weights are worth on the training text, dropout off, float32.

These classes are the file `metrics.json`, the `metrics` of the trainer's message, and, with the fields that know a
clock, the answer of `GET /jobs/{id}/metrics`. Every metric is declared here once. A field that was added later is
optional, so that older files and rows can be read; a field that this version does not know is kept.

Knows no torch, no database and no HTTP.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema

Number = Annotated[int | float, WithJsonSchema({"type": "number"})]
"""A number that stays an integer where it is one: a file and a database row write it differently."""

_LARGEST_EXPONENT = 709
"""exp() of more is no float."""


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is too large for a float."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else None


def largest_loss(of_perplexity: float) -> float:
    """The largest loss whose perplexity is at most `of_perplexity` (finite, above 0): to compare losses with it is to
    compare perplexities with that, to the last bit."""
    loss = math.log(of_perplexity)
    while math.exp(loss) > of_perplexity:
        loss = math.nextafter(loss, -math.inf)
    while math.exp(above := math.nextafter(loss, math.inf)) <= of_perplexity:
        loss = above
    return loss


class Measured(BaseModel):
    """A frozen record without NaN or infinity; the docstring under a field is its public description."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ReconstructedToken(Measured):
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


class Reconstruction(Measured):
    """The model's prediction for every target of the training text, the first 2,048 of them."""

    model_config = ConfigDict(extra="allow")

    text: str
    """The predicted tokens, joined."""

    tokens: list[ReconstructedToken] | None = None
    """Each target with the prediction; null with `?tokens=false`."""

    truncated: bool = False
    """Whether the text has more targets than are recorded."""


class Continuation(Measured):
    """What a checkpoint continues from the first tokens of the training text."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    """The first `cont_prefix_tokens` tokens of the text."""

    text: str
    """The text that the model adds to the prompt."""


class Baselines(Measured):
    """Losses of simpler predictors on a job's text, in nats per token."""

    uniform: float
    """Loss of a predictor that knows nothing: ln of the vocabulary's size."""

    unigram: float
    """Loss of a predictor that knows only how often each token stands in the text."""

    bigram: float
    """Loss of a predictor that knows how often each token follows the one before it."""


class Position(Measured):
    """The place of a checkpoint in its training."""

    model_config = ConfigDict(extra="allow")

    percent: int
    """Percent of the checkpoint: 0, 25, 50, 75 or 100."""

    step: int
    """Optimizer steps before the checkpoint."""

    epoch: Number
    """Passes over the text before the checkpoint."""


class Losses(Position):
    """How well a checkpoint predicts the training text."""

    loss: float
    """Cross-entropy in nats per token of these weights on the training text, of a long one on `eval_targets` of its
    tokens: dropout off, float32, no auxiliary loss mixed in. Whoever loads the weights can compute it again."""

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


class CheckpointFigures(Losses):
    """The numbers of a checkpoint, measured on the training text with dropout off."""

    val_loss: float | None = None
    """Loss of the tokens held out; null when `val_fraction` is 0."""

    baselines: Baselines | None = None
    """Losses of simpler predictors on all of the training text, to compare `loss` with: ln V (`uniform`), and the
    entropies of the text's own `unigram` and `bigram` counts."""

    eval_targets: int | None = None
    """Targets that `loss` and the other figures were measured on: all of the training text, or `eval_max_tokens` of
    them in windows spread evenly over it, the same at every checkpoint. Null in checkpoints of earlier versions, which
    measured all."""

    loss_stderr: float | None = None
    """Standard error of `loss` as an estimate of the whole training text's loss, from the means of the windows that
    were measured; 0 where all of the text was, null where a single window of several was."""

    best_val_loss: float | None = None
    """Lowest `val_loss` among the evaluations that `early_stopping_patience` has looked at so far; null where there
    were none."""

    best_val_step: int | None = None
    """Optimizer steps before the evaluation that gave `best_val_loss`."""

    stopped_early: bool = False
    """Whether `stop_at_perplexity` or `early_stopping_patience` ended training here, before its last step."""


class MixtureFigures(Measured):
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


class CardToken(Measured):
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
    """`loss` with the output of that expert removed: a busy expert need not be an important one; null for many
    experts."""

    cards: list[list[CardToken]] | None = None
    """Tokens that each expert was given most often, the most frequent first."""


class MixtureMetrics(Measured):
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

    def to_file(self) -> dict[str, Any]:
        """The content of `metrics.json`: the fields that were set, in the order that the file has always had, so that
        equal runs give equal bytes."""
        content = self.model_dump(exclude_unset=True)
        if self.moe is not None:
            content["moe"]["layers"] = [_ordered(layer, _FIRST_OF_A_LAYER) for layer in content["moe"]["layers"]]
        return _ordered(content, _FIRST_IN_FILE)

    def to_row(self) -> dict[str, Any]:
        """The fields that were set, without the position, which a database row has in columns of its own."""
        return self.model_dump(exclude_unset=True, exclude=set(Position.model_fields))


_FIRST_IN_FILE = (
    "percent", "step", "epoch", "loss", "perplexity", "bits_per_byte", "train_loss", "accuracy", "val_loss",
    "baselines", "eval_targets", "loss_stderr", "best_val_loss", "best_val_step", "reconstruction",
    "continuation", "moe",
)  # fmt: skip
_FIRST_OF_A_LAYER = ("layer", "load", "importance", "loss_without")


def _ordered(content: Mapping[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
    """`content` with the keys `first` before all others."""
    return {name: content[name] for name in first if name in content} | dict(content)
