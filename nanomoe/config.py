"""Every knob of a job, declared once: type, bounds, default, and under each field its unit and meaning.

The same classes are the HTTP body, the OpenAPI document, the JSON column of the job's row, the trainer's input and the
`config.json` of a checkpoint. The defaults are the reference run: one Portuguese paragraph, 500 epochs, a GPT of
4 layers, 4 heads and 128 channels. Knows no torch, no HTTP and no database.
"""

import math
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError

Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


def _as_integer(given: object) -> object:
    """A number without a fraction is an integer (JSON Schema 2020-12, 6.1.1), however it is written; true is none."""
    if isinstance(given, bool):
        raise PydanticKnownError("int_type")
    return int(given) if isinstance(given, float) and given.is_integer() else given


Whole = BeforeValidator(_as_integer)
"""Marks what is an integer in JSON: 50 and 50.0 are read as 50; `true` and `"50"` are refused.

It comes last in an `Annotated`: a bound after it would be missing from the JSON schema."""

Integer = Annotated[int, Whole]
"""An integer in what users send."""

Percent = Literal[0, 25, 50, 75, 100]
"""A checkpoint of a job: how much of the training came before."""

PERCENTS: tuple[Percent, ...] = get_args(Percent)
"""The percents of all checkpoints of a job, ascending."""

JOB_ID_PATTERN = r"^[0-9a-f]{32}$"
"""Pattern of a job's id: 32 hexadecimal digits."""

JOB_REFERENCE_PATTERN = r"^[^\x00-\x1f\x7f]{1,200}$"
"""Pattern of what stands for a job in a request: its id, its name, or a unique beginning of its id."""


class Strict(BaseModel):
    """A frozen value that refuses unknown keys, coercions (`"1"` or `true` for a number), NaN and infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ConfigWarning(Strict):
    """A config that is legal but a trap: reported in the job's answer, never an error."""

    code: str
    """Stable, machine-readable name of the warning."""

    message: str
    """What will happen, with the figures."""


class InitFrom(Strict):
    """The checkpoint whose weights a job starts from."""

    job_id: str = Field(max_length=200, pattern=JOB_REFERENCE_PATTERN)
    """The job that recorded the checkpoint: its id; in a request its name or a unique beginning of its id as well."""

    checkpoint: Annotated[Percent, Whole] = 100
    """Percent of the checkpoint."""


class ModelConfig(Strict):
    """What `GPT(config, vocab_size)` is built from. Field names are nanoGPT's and transformers'."""

    tokenizer: str = Field("ptbr-8k", min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")
    """`ptbr-8k` (bundled, 8,192 entries), `bytes` (256), `train:N` (byte-level BPE of N entries on the job's own text),
    or a local folder or hub name that the server's settings allow."""

    block_size: Integer = Field(100, ge=1, le=65_536)
    """Tokens: the longest context, and the length of a training window."""

    n_layer: Integer = Field(4, ge=1, le=256)
    """Blocks: attention followed by an MLP or a mixture of experts."""

    n_head: Integer = Field(4, ge=1, le=256)
    """Attention heads of a block; must divide `n_embd`."""

    n_embd: Integer = Field(128, ge=1, le=65_536)
    """Channels C of the residual stream."""

    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of activations zeroed in training, at the embedding, the attention weights and both residual branches."""

    bias: bool = True
    """Whether Linear and LayerNorm layers have a bias."""

    use_moe: bool = False
    """Replace the MLP of every `moe_stride`-th block by a mixture of experts."""

    n_experts: Integer = Field(8, ge=1, le=4096)
    """Experts E of an MoE layer."""

    k: Integer = Field(2, ge=1, le=4096)
    """Experts that each token is sent to (`top_k` is sampling)."""

    moe_stride: Integer = Field(2, ge=1, le=256)
    """Layer i is an MoE when (i + 1) % moe_stride == 0: with 2, every other layer, the dense first."""

    norm_topk_prob: bool | None = None
    """Divide the chosen gates by their sum; null means true for k > 1. With k = 1 the gate is then a constant 1."""

    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """What turns router logits into gate weights."""

    router_noise: bool = False
    """Learned noise on the router logits, in training only (Shazeer et al., arXiv 1701.06538)."""

    capacity_factor: float | None = Field(None, gt=0, le=4096)
    """Each expert takes at most ceil(capacity_factor * T * k / E) of a training micro-batch's T * k assignments;
    null drops nothing."""

    n_shared_experts: Integer = Field(0, ge=0, le=64)
    """Experts that see every token with gate 1, beside the routed ones (DeepSeekMoE, arXiv 2401.06066)."""

    expert_hidden_ratio: float = Field(4.0, gt=0, le=64)
    """Hidden width F of one expert, in units of `n_embd`."""

    router_aux_loss_coef: float = Field(0.01, ge=0, le=100)
    """Weight of the load-balance loss (Switch, arXiv 2101.03961, eq. 4-6) in the training objective."""

    router_z_loss_coef: float = Field(0.001, ge=0, le=100)
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5) in the training objective."""

    router_bias_update_rate: float = Field(0.0, ge=0, le=1)
    """Step of the balance bias that steers the choice without a loss (DeepSeek-V3, arXiv 2412.19437); 0 is off."""

    upcycle_noise: float = Field(0.0, ge=0, le=1)
    """Standard deviation, in units of each weight's own, of the noise added to the copies of a dense parent's MLP, so
    that experts differ."""

    @property
    def renormalises_gates(self) -> bool:
        """Whether the k chosen gates are divided by their sum."""
        return self.k > 1 if self.norm_topk_prob is None else self.norm_topk_prob

    @property
    def expert_hidden(self) -> int:
        """Hidden width F of one expert, in channels."""
        return round(self.expert_hidden_ratio * self.n_embd)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) holds a mixture of experts."""
        return self.use_moe and (layer + 1) % self.moe_stride == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The blocks, from 0, that hold a mixture of experts."""
        return tuple(layer for layer in range(self.n_layer) if self.is_moe_layer(layer))

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.k > self.n_experts:
            raise ValueError(f"k ({self.k}) must be at most n_experts ({self.n_experts})")
        if self.use_moe:
            if not self.moe_layers:
                raise ValueError(
                    f"with moe_stride {self.moe_stride} none of the {self.n_layer} layers is an MoE; "
                    f"set moe_stride to {self.n_layer} or less"
                )
            hidden = self.expert_hidden_ratio * self.n_embd
            if self.expert_hidden < 1 or not math.isclose(hidden, self.expert_hidden):
                raise ValueError(
                    f"expert_hidden_ratio * n_embd must be a whole number of channels, 1 or more; "
                    f"{self.expert_hidden_ratio} * {self.n_embd} is {hidden:g}"
                )
        return self


class TrainConfig(Strict):
    """How a model is trained."""

    epochs: Integer = Field(500, ge=1, le=10_000_000)
    """Passes over the training text."""

    max_steps: Annotated[int, Field(ge=1, le=1_000_000_000), Whole] | None = None
    """Optimizer steps after which training ends although epochs remain; null is no limit."""

    lr: float = Field(1e-4, gt=0, le=10)
    """Peak learning rate."""

    min_lr: float = Field(0.0, ge=0, le=10)
    """Learning rate at the end of a cosine schedule; at most `lr`."""

    warmup_steps: Integer = Field(0, ge=0, le=1_000_000_000)
    """Steps over which the learning rate rises linearly to `lr`."""

    lr_schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after warm-up."""

    weight_decay: float = Field(1e-2, ge=0, le=10)
    """Decoupled decay of weights with two or more dimensions; biases and LayerNorm weights never decay."""

    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = Field(1e-8, gt=0, le=1)
    """AdamW's term that keeps the division finite."""

    grad_clip: float | None = Field(None, gt=0, le=1e6)
    """Largest norm of the whole gradient; null does not clip."""

    batch_size: Integer = Field(12, ge=1, le=65_536)
    """Windows of a micro-batch. A text of at most `block_size` tokens is a single window."""

    gradient_accumulation_steps: Integer = Field(1, ge=1, le=65_536)
    """Micro-batches of an optimizer step; never crossing an epoch."""

    seed: Integer = Field(42, ge=0, lt=2**63)
    """Decides the initial weights, the order of windows, dropout and the sampling at checkpoints."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; weights and optimizer stay float32. `auto` is bfloat16 on a GPU that has
    it, float32 elsewhere."""

    val_fraction: float = Field(0.0, ge=0, le=0.9)
    """Share of the text's tokens, at its end, held out of training; when above 0, at least 2 tokens."""

    stop_at_perplexity: float | None = Field(None, gt=1, le=1e9)
    """End early, at percent 100, once the training text's evaluation perplexity is at most this; null never does."""

    early_stopping_patience: Annotated[int, Field(ge=1, le=1_000_000), Whole] | None = None
    """End early, at percent 100, once `val_loss` has not improved in this many consecutive evaluations; null never
    does. Needs `val_fraction` above 0."""

    early_stopping_min_delta: float = Field(0.0, ge=0, le=100)
    """Nats per token by which `val_loss` must fall below its lowest value so far to count as an improvement."""

    eval_interval: Annotated[int, Field(ge=1, le=1_000_000_000), Whole] | None = None
    """Steps between the evaluations that `stop_at_perplexity` and `early_stopping_patience` look at; null is one
    epoch."""

    eval_max_tokens: Annotated[int, Field(ge=256, le=1_000_000_000), Whole] | None = None
    """Most targets that an evaluation measures, in windows spread evenly over a longer text, the same at every
    checkpoint; at least one window. Null is 3 % of the tokens that the job trains on, between 8,192 and 65,536."""

    deterministic: bool = False
    """Promise equal bytes for equal runs on a GPU too, at some speed; a CPU always keeps that promise."""

    init_from: InitFrom | None = None
    """Start from another job's weights instead of random ones, and go on with its tokenizer. With `use_moe`, every
    expert begins as a copy of a dense parent's MLP (sparse upcycling, arXiv 2212.05055)."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) must be at most lr ({self.lr:g})")
        return self

    @model_validator(mode="after")
    def _early_stopping_has_a_loss(self) -> Self:
        if self.early_stopping_patience is not None and self.val_fraction == 0:
            raise ValueError("early_stopping_patience needs val_fraction above 0: it looks at val_loss")
        return self


class SamplingConfig(Strict):
    """How the next token is chosen."""

    temperature: float = Field(1.0, ge=0, le=100)
    """Divides the logits before sampling; 0 takes the likeliest token."""

    top_k: Annotated[int, Field(ge=1, le=1_000_000), Whole] | None = None
    """Sample among this many likeliest tokens; null among all."""

    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the likeliest tokens that together hold this much probability; null among all."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1


class SampleConfig(Strict):
    """What is continued at each checkpoint, and how the next token is chosen."""

    cont_prefix_tokens: Integer = Field(10, ge=1, le=65_536)
    """Tokens from the start of the text that every checkpoint continues."""

    cont_max_new_tokens: Integer = Field(25, ge=0, le=65_536)
    """Tokens of the continuation."""

    temperature: float = Field(0.1, ge=0, le=100)
    """Divides the logits before sampling; 0 takes the likeliest token."""

    top_k: Annotated[int, Field(ge=1, le=1_000_000), Whole] | None = 1
    """Sample among this many likeliest tokens; null among all."""


class JobConfig(ModelConfig, TrainConfig, SampleConfig):
    """The flat config of a job: `{"epochs": 500, "lr": 1e-4, "use_moe": true, "n_experts": 8, "k": 2}`."""
