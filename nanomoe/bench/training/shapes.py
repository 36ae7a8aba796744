"""The training steps that are measured: a model, a text, and how many windows of it a step has.

Each shape has a twin with a mixture of experts of which a token meets as many parameters.
"""

from dataclasses import dataclass, replace

from nanomoe.bench.models import MODELS, paragraph, tokenizer_of
from nanomoe.config import JobConfig
from nanomoe.model.size import flops_per_token, n_active_params, n_params
from nanomoe.tokenizer import Tokenizer, load_tokenizer

_MIXTURE = MODELS["mixture"].model_dump(include={"use_moe", "n_experts", "k", "expert_hidden_ratio"})
_BYTES = 256
"""Entries of the vocabulary of bytes."""


@dataclass(frozen=True)
class Shape:
    """What one optimizer step trains: all windows of a text."""

    name: str
    """Name of the shape."""

    config: JobConfig
    """The job's config."""

    vocab_size: int
    """Entries of the vocabulary."""

    n_windows: int
    """Windows of a step."""

    length: int
    """Tokens of a window."""

    needs_gpu: bool = False
    """Whether a step takes too long on a CPU to be repeated."""

    @property
    def n_tokens(self) -> int:
        """Tokens of a step."""
        return self.n_windows * self.length

    @property
    def n_params(self) -> int:
        """Parameters of the model."""
        return n_params(self.config, self.vocab_size)

    @property
    def n_active_params(self) -> int:
        """Parameters that one token meets."""
        return n_active_params(self.config, self.vocab_size)

    @property
    def flops(self) -> int:
        """Floating-point operations of a step by the published formula: 6 N + 12 L H Q T for each token."""
        return self.n_tokens * flops_per_token(self.config, self.vocab_size, self.length)

    def mixture(self) -> "Shape":
        """The twin with a mixture of experts."""
        changed = JobConfig.model_validate(self.config.model_dump() | _MIXTURE)
        return replace(self, name=f"{self.name}-mixture", config=changed)

    def with_dropout(self, dropout: float) -> "Shape":
        """The same shape with another share of dropped activations."""
        return replace(self, config=self.config.model_copy(update={"dropout": dropout}))

    def tokenizer(self) -> Tokenizer:
        """A tokenizer with this vocabulary."""
        return load_tokenizer("bytes") if self.vocab_size == _BYTES else tokenizer_of(self.vocab_size)

    def text(self, tokenizer: Tokenizer) -> str:
        """A text that is cut into exactly these windows."""
        n_tokens = self.n_tokens if self.n_windows == 1 else self.n_tokens + 1
        if len(tokenizer.encode(paragraph())) == n_tokens:
            return paragraph()
        return text_of(tokenizer, n_tokens)


def text_of(tokenizer: Tokenizer, n_tokens: int) -> str:
    """The bundled paragraph without accents, repeated and cut so that it has exactly `n_tokens` tokens."""
    once = paragraph().encode("ascii", "ignore").decode() + " "
    repetitions = 1 + n_tokens // len(tokenizer.encode(once))
    text = once * (repetitions + 1)
    end = len(tokenizer.decode(tokenizer.encode(text)[:n_tokens]))
    while len(tokenizer.encode(text[:end])) > n_tokens:
        end -= 1
    while len(tokenizer.encode(text[:end])) < n_tokens:
        end += 1
    assert len(tokenizer.encode(text[:end])) == n_tokens, "one more character is at most one more token"
    return text[:end]


_GPT2 = JobConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("reference", JobConfig(), 8_192, n_windows=1, length=87),
        Shape("reference-50k", JobConfig(), 50_257, n_windows=1, length=87),
        Shape("small", JobConfig(block_size=64), _BYTES, n_windows=12, length=64),
        Shape("gpt2", _GPT2, 50_257, n_windows=12, length=1024, needs_gpu=True),
    )
}
"""By name: the reference run with its own vocabulary and with GPT-2's; a small one on bytes; and GPT-2 of 124 M."""
