"""What a model costs, from arithmetic on its config: parameters, memory, floating-point operations.

Knows no torch: a job that cannot fit is refused from these figures before anything is built.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

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


Way = Literal["eager", "fused", "captured", "triton"]
"""How a step is done: `nanomoe.training.steps`."""

_LOGITS_AT_ONCE = 1 << 24
"""Most logits that a fused step holds: `nanomoe.training.steps.micro_batch`."""


def training_bytes(
    config: JobConfig,
    vocab_size: int,
    n_tokens: int | None,
    *,
    way: Way = "fused",
    micro_batch: int | None = None,
    recomputes: bool = False,
    activation_bytes: int = 4,
) -> int:
    """Bytes of a job at its peak, beside what the process has before it.

    The sum of what may be there at one time, for P parameters: weights and AdamW's two moments, 12 P; a step
    (`_step_bytes`); the copy of the weights that percent 0 is evaluated on beside the first steps, 4 P; an evaluation
    (`_evaluation_bytes`), whose blocks the C library does not give back before its checkpoint is made; the bytes of
    that on their way to the disk, each tensor's and the file's, 8 P; the file of the checkpoint before, until whoever
    trains lets it go, 4 P; on a GPU, where no file lies, the copy of weights and moments that a snapshot is made of,
    12 P; and `_BESIDE_TENSORS`.

    Derived from the code, tensor by tensor; what was measured is named where it stands. Within 20 % of the peaks of
    the jobs in `tests.nanomoe.training.peaks`, on a CPU, where one thread reads in the evaluations. A captured step is
    taken to hold the same tensors as an eager one, with kernels of our own too, which keep fewer (assumed, as is all
    of a GPU's arithmetic).

    `n_tokens` None stands for a text that fills the batch. `micro_batch`: windows computed together, where that is not
    the config's. `recomputes`: blocks are computed again in the backward pass. `activation_bytes`: 2 in bfloat16; the
    logits are float32 always.
    """
    B = config.block_size
    T = B if n_tokens is None else min(B, n_tokens)
    size = micro_batch or config.batch_size
    windows = size if n_tokens is None else min(size, n_windows(n_tokens, B))
    P = n_params(config, vocab_size)
    step = _step_bytes(config, vocab_size, T, windows, way, recomputes, activation_bytes)
    evaluation = _evaluation_bytes(config, vocab_size, T, windows * T if n_tokens is None else n_tokens, way)
    beside_step = (4 + 12) * P if way in ("captured", "triton") else (4 + 8 + 4) * P
    return 12 * P + step + beside_step + evaluation + _BESIDE_TENSORS


def least_training_bytes(config: JobConfig, vocab_size: int, n_tokens: int | None) -> int:
    """Bytes without which a job cannot be trained in any way: one window at a time, or all of a micro-batch where a
    smaller one would drop other tokens, and blocks computed again."""
    micro_batch = 1 if config.capacity_factor is None else None
    ways: tuple[tuple[Way, bool], ...] = (("fused", False), ("eager", True))
    return min(
        training_bytes(config, vocab_size, n_tokens, way=way, micro_batch=micro_batch, recomputes=recomputes)
        for way, recomputes in ways
    )


_BESIDE_TENSORS = 8 * 2**20
"""What a job takes beside its tensors: the text's tokens and their metrics as Python objects, and code that is loaded
when it is first used (measured: 10 MB in the job whose blocks were mapped, see `_HEAP`)."""


_HEAP = 1.25
"""Resident bytes over those of an eager step's activations on a CPU (chosen on 15 jobs, of which it leaves none further
than 20 % from its prediction). Below 32 MiB glibc takes blocks from a heap, whose gaps seldom fit the next ones. The
tensors are as derived: where each block was mapped by itself, a job's peak was their sum to 5 % (measured on one
mixture, 8 x 256 tokens, 205 MiB, which by glibc's own rule took 285 to 342)."""


def _step_bytes(
    config: JobConfig, vocab_size: int, T: int, windows: int, way: Way, recomputes: bool, activation_bytes: int
) -> int:
    """Gradients, activations and logits of a step: its peak."""
    N, V, C = windows * T, vocab_size, config.n_embd
    all_gradients = 4 * n_params(config, V)
    if way == "fused":  # its buffers stay
        return all_gradients + 4 * (N * _fused_numbers_of_token(config, T) + min(N * V, max(V, _LOGITS_AT_ONCE)))
    rows = _rows_of_token(config, way, activation_bytes)
    heap = _HEAP if way == "eager" else 1.0
    of_token = _Autograd.of(config, T, rows=rows, drops=config.dropout > 0, recomputes=recomputes)
    # When the gradient of the logits is computed: their logarithm, its gradient, and theirs.
    at_logits = N * (heap * activation_bytes * of_token.kept + 12 * V)
    # When the last block's is: those of the output layer and of one more matrix are there.
    is_mixture = config.is_moe_layer(config.n_layer - 1)
    matrix = config.n_experts * C * config.expert_hidden if is_mixture else 4 * C * C
    at_last_block = N * heap * activation_bytes * of_token.in_last_block + 4 * (V * C + matrix)
    # At the end all gradients are, and for a moment two of the tied embedding, and their sum.
    return round(max(at_logits, at_last_block, all_gradients + 8 * V * C))


def _fused_numbers_of_token(config: JobConfig, T: int) -> int:
    """Numbers of the buffers of `nanomoe.training.steps.micro_batch`, per token, without logits."""
    C, E, K, S, F = config.n_embd, config.n_experts, config.k, config.n_shared_experts, config.expert_hidden
    attention = 8 * C + config.n_head * T  # two norms with their inputs; queries, keys, values, result; weights
    n_moe = len(config.moe_layers)
    mixture = (2 * K + S) * C + 2 * (K + S) * F + (5 if config.router_noise else 2) * E
    of_layers = config.n_layer * attention + (config.n_layer - n_moe) * 8 * C + n_moe * mixture
    once = 19 * C + 3 * config.n_head * T
    of_mixtures = (K + S) * (C + F) + C + 2 * E if n_moe else 0
    return of_layers + once + of_mixtures


def _rows_of_token(config: JobConfig, way: Way, activation_bytes: int) -> float:
    """Rows of the experts' products for each token, operator by operator: `nanomoe.model.moe`.

    On a CPU between k and twice as many, since more padding makes it take grouped products: the middle is assumed
    (measured in first steps: 1.0 to 2.0 k). On a GPU k in bfloat16, by grouped products, else all experts' (assumed).
    """
    K, E = config.k, config.n_experts
    if K == E:
        return K
    if way == "eager":
        return 1.5 * K
    return K if activation_bytes == 2 else E


class _Autograd(NamedTuple):
    """Numbers per token that `nanomoe.model.gpt` holds for its backward pass, without logits."""

    kept: int
    """After the forward pass."""
    in_last_block: int
    """At the peak of the last block's backward pass."""

    @classmethod
    def of(cls, config: ModelConfig, T: int, *, rows: float, drops: bool, recomputes: bool) -> Self:
        """Those of windows of T tokens. `rows`: rows of the experts' products; `drops`: whether there is dropout."""
        C, K, S, E, F = config.n_embd, config.k, config.n_shared_experts, config.n_experts, config.expert_hidden
        weights = config.n_head * T
        # Input and output of both norms; queries, keys, values; the attention's result. With dropout, the mask of the
        # branch, and the attention written out: softmax, its mask, and their product.
        attention = 8 * C + (C + 3 * weights if drops else 0)
        # The hidden layer before and after GELU; with dropout a mask.
        mlp = 8 * C + (C if drops else 0)
        # Copied inputs, and hidden layers; the outputs that the gates are multiplied with; with dropout their masks.
        masks = (K + S) * C if drops else 0
        hidden = round(rows * (C + 2 * F))
        router = (8 if config.router_noise else 4) * E
        mixture = hidden + 2 * S * F + K * C + masks + router
        n_moe = len(config.moe_layers)
        once = (3 if drops else 2) * C  # the last norm's input and output; the mask of the embedding
        blocks = config.n_layer * attention + (config.n_layer - n_moe) * mlp + n_moe * mixture
        is_mixture = config.is_moe_layer(config.n_layer - 1)
        # Backwards through the last block. In its feed-forward part, the gradients of the hidden layer (before and
        # after GELU, while one of its own is gone) and of a mixture's outputs; shared experts are done by then.
        in_mixture = mixture - masks - K * C - 2 * S * F + round(rows * (C + F)) + 2 * C
        in_branch = in_mixture if is_mixture else mlp + 5 * C
        # In its attention, the gradients of weights and scores, and those of what they are made of.
        in_attention = 2 * weights + 4 * C if drops else 5 * C
        last_ffn = mixture if is_mixture else mlp
        beside_blocks = max(in_branch, in_attention) - last_ffn
        if recomputes:
            largest = attention + max(mlp if n_moe < config.n_layer else 0, mixture if n_moe else 0)
            kept = config.n_layer * C + once
            return cls(kept, kept + largest + beside_blocks)
        return cls(blocks + once, blocks + once + beside_blocks)


def _evaluation_bytes(config: JobConfig, vocab_size: int, T: int, n_tokens: int, way: Way) -> int:
    """Tensors of an evaluation at its peak: a batch on its way through the model, or in a mixture the graph of window
    0, from which the routers' gradients come."""
    V, C, E, F = vocab_size, config.n_embd, config.n_experts, config.expert_hidden
    K, S = config.k, config.n_shared_experts
    of_text = -(-n_tokens // T) * T
    rows = _rows_of_token(config, "eager", 4)
    if way == "fused":
        # `nanomoe.training.steps.fused_reader`, one thread.
        N = min(of_text, max(T, _READ_TOGETHER // T * T))
        of_token = 16 * C + config.n_head * T + min(V, _READ_TOGETHER)
        if config.use_moe:
            of_token += (2 * K + S + E + 2) * C + max(K, min(S, 1)) * F + 2 * E + 7 * K
        batch = 4 * N * of_token
    else:
        # `nanomoe.evaluation.reader.PlainReader`: a batch of `BATCH_BYTES`, logits and their logarithm of
        # `LOGITS_BYTES`; without an expert, 2,048 tokens at once.
        hidden = max(4 * C, (K + S) * F) if config.use_moe else 4 * C
        numbers, logits = (1 << 26, 1 << 26) if way in ("captured", "triton") else (1 << 22, 1 << 20)
        N = min(of_text, max(T, numbers // ((8 * C + hidden) * T) * T))
        if config.use_moe:
            N = max(N, min(of_text, max(T, 2048 // T * T)))
        of_layer = round(rows * (C + 2 * F)) if config.use_moe else 8 * C
        batch = 4 * N * (of_layer + 4 * C) + 8 * min(N * V, max(V, logits))
    if not config.use_moe:
        return batch
    graph = _Autograd.of(config, T, rows=rows, drops=False, recomputes=False)
    return max(batch, 4 * T * max(graph.kept + 3 * V, graph.in_last_block))


_READ_TOGETHER = 512
"""Tokens that a fused evaluation reads together, and entries of the vocabulary: `nanomoe.training.steps.fused_reader`.
"""


@dataclass(frozen=True)
class Sizes:
    """Size of a job's model and the work of training it; None where the vocabulary is not known yet."""

    n_params: int | None = None
    """Trainable parameters, the tied embedding and output layer counted once."""
    n_active_params: int | None = None
    """Parameters that one token passes through."""
    training_bytes: int | None = None
    """Bytes of memory at the peak of training on a CPU."""
    least_training_bytes: int | None = None
    """Bytes of memory without which the job cannot be trained."""
    flops_per_token: int | None = None
    """Floating-point operations of a training step per token."""

    @classmethod
    def of(cls, config: JobConfig, vocab_size: int, n_tokens: int) -> Self:
        """The sizes of a job with these many entries in the vocabulary and tokens in the text."""
        return cls(
            n_params=n_params(config, vocab_size),
            n_active_params=n_active_params(config, vocab_size),
            training_bytes=training_bytes(config, vocab_size, n_tokens),
            least_training_bytes=least_training_bytes(config, vocab_size, n_tokens),
            flops_per_token=flops_per_token(config, vocab_size, min(n_tokens, config.block_size)),
        )
