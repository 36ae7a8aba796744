"""What a model costs, from arithmetic on its config: parameters, memory, floating-point operations.

Knows no torch: a job that cannot fit is refused from these figures before anything is built.
"""

from dataclasses import dataclass
from typing import Self

from nanomoe.config import JobConfig, ModelConfig
from nanomoe.plan import n_windows


def _linear(n_in: int, n_out: int, bias: bool) -> int:
    return n_in * n_out + (n_out if bias else 0)


def _mlp(config: ModelConfig, hidden: int) -> int:
    return _linear(config.n_embd, hidden, config.bias) + _linear(hidden, config.n_embd, config.bias)


def _router(config: ModelConfig) -> int:
    return config.n_experts * config.n_embd * (2 if config.router_noise else 1)


def _n_params(config: ModelConfig, vocab_size: int, experts_counted: int) -> int:
    C = config.n_embd
    layer_norm = C * (2 if config.bias else 1)
    attention = _linear(C, 3 * C, config.bias) + _linear(C, C, config.bias)
    n_moe = len(config.moe_layers)
    moe = _router(config) + (experts_counted + config.n_shared_experts) * _mlp(config, config.expert_hidden)
    return (
        (vocab_size + config.block_size) * C
        + config.n_layer * (2 * layer_norm + attention)
        + (config.n_layer - n_moe) * _mlp(config, 4 * C)
        + n_moe * moe
        + layer_norm
    )


def n_params(config: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, the tied embedding and output layer counted once."""
    return _n_params(config, vocab_size, config.n_experts)


def n_active_params(config: ModelConfig, vocab_size: int) -> int:
    """Parameters that one token meets: of each MoE layer the router, k experts and the shared ones."""
    return _n_params(config, vocab_size, config.k)


def flops_per_token(config: ModelConfig, vocab_size: int, context: int) -> int:
    """Floating-point operations of a training step per token, at `context` tokens of context.

    6 per active weight that takes part in a matrix product (2 forward, 4 backward), and 12 * n_layer * C * context for
    the two attention products (PaLM, arXiv 2204.02311, appendix B). Look-ups in the position table cost none.
    """
    weights = n_active_params(config, vocab_size) - config.block_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * context


def training_bytes(config: JobConfig, vocab_size: int, n_tokens: int | None) -> int:
    """Bytes that training needs at least: weights, gradients, two AdamW moments and the activations of a micro-batch.

    All in float32. Activations are those kept for the backward pass: per token about 34 C for a block's dense parts,
    the attention probabilities and their masks, and the logits with their gradient. An estimate from below, good to
    refuse what cannot fit. `n_tokens` None stands for a text that fills the batch.
    """
    C, B = config.n_embd, config.block_size
    tokens_of_window = B if n_tokens is None else min(B, n_tokens)
    windows = config.batch_size if n_tokens is None else min(config.batch_size, n_windows(n_tokens, B))
    expert_rows = config.k + config.n_shared_experts
    per_token = (
        config.n_layer * (18 * C + 2 * config.n_head * tokens_of_window)
        + (config.n_layer - len(config.moe_layers)) * 16 * C
        + len(config.moe_layers) * expert_rows * (2 * config.expert_hidden + 2 * C)
        + 3 * vocab_size
    )
    return 4 * (4 * n_params(config, vocab_size) + windows * tokens_of_window * per_token)


@dataclass(frozen=True)
class Sizes:
    """Size of a job's model and the work of training it; None where the vocabulary is not known yet."""

    n_params: int | None = None
    """Trainable parameters, the tied embedding and output layer counted once."""
    n_active_params: int | None = None
    """Parameters that one token passes through."""
    training_bytes: int | None = None
    """Bytes of memory that training needs at least."""
    flops_per_token: int | None = None
    """Floating-point operations of a training step per token."""

    @classmethod
    def of(cls, config: JobConfig, vocab_size: int, n_tokens: int) -> Self:
        """The sizes of a job with these many entries in the vocabulary and tokens in the text."""
        return cls(
            n_params=n_params(config, vocab_size),
            n_active_params=n_active_params(config, vocab_size),
            training_bytes=training_bytes(config, vocab_size, n_tokens),
            flops_per_token=flops_per_token(config, vocab_size, min(n_tokens, config.block_size)),
        )
