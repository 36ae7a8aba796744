"""Which jobs may be trained together, as one program: those of equal shape. Arithmetic only, known at submission.

Knows no torch: the service groups queued jobs by their shape, and a trainer trains a group.
"""

import hashlib
import json
from typing import Any

from nanomoe.config import JobConfig, ModelConfig
from nanomoe.model.size import n_active_params
from nanomoe.plan import Plan

MOST_WORK = 4e10
"""Active parameters times tokens of the largest micro-batch that is trained in company: with more, one job keeps a
device busy by itself. A GPU does a step of 2e8 in company for a twentieth of its time alone (measured on an H200); the
bound itself is assumed."""

LENGTHS = 32
"""Texts of a single window have one shape if their lengths, rounded up to a multiple of this, are the same."""

_MAY_DIFFER = {"tokenizer", "dropout"}
"""Fields of the model's config in which the members of a cohort may differ; of a tokenizer only the number of entries
decides a shape."""


def cohort_key(config: JobConfig, *, vocab_size: int, n_tokens: int) -> str | None:
    """The shape of a job with these many entries in its vocabulary and tokens in its text, as a hexadecimal digest;
    None for one that is too large to gain from company.

    Equal shapes have tensors of equal sizes in every step: the model, the windows of a micro-batch and the
    micro-batches of a step are the same. Text, seed, dropout, learning rate, optimizer, schedule, length and sampling
    may differ; and the length of a text that is shorter than a window by less than `LENGTHS` tokens, up to which one
    program fills it up.

    Raises:
        TextTooShort: fewer than 2 tokens are left to train on.
    """
    plan = Plan.of(config, n_tokens)
    window = min(config.block_size, plan.n_train_tokens)
    micro_batch = min(config.batch_size, plan.n_windows)
    if n_active_params(config, vocab_size) * micro_batch * window > MOST_WORK:
        return None
    model = config.model_dump(mode="json", include=set(ModelConfig.model_fields) - _MAY_DIFFER)
    shape: dict[str, Any] = model | {
        "vocab_size": vocab_size,
        "precision": config.precision,
        "deterministic": config.deterministic,
        "window": min(config.block_size, -(-window // LENGTHS) * LENGTHS) if plan.n_windows == 1 else window,
        "micro_batch": micro_batch,
        "micro_batches": min(config.gradient_accumulation_steps, -(-plan.n_windows // config.batch_size)),
    }
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:32]
