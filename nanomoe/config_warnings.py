"""The traps of a config that is legal: knobs that do nothing, figures that do not fit the text.

What is judged are values, never which of them were written down: a job's row, a checkpoint's `config.json` and the
trainer hold complete configs, in which every field is given. A knob that has its default is nobody's wish. Knows no
torch.
"""

from collections.abc import Callable

from nanomoe.config import ConfigWarning, JobConfig, ModelConfig
from nanomoe.plan import Plan
from nanomoe.tokenizer import MIN_VOCAB_SIZE

MIN_BYTES_PER_TOKEN = 2.5
"""At or below, a tokenizer was made for other texts: with `ptbr-8k` a token holds 3.7 to 4.1 bytes of Portuguese prose,
2.4 of English, 1.0 of Russian or Chinese (measured)."""

MIN_JUDGED_BYTES = 100
"""Shortest text that is judged. In a shorter one the bytes per token are chance: of 2,000 spans of Portuguese prose
with 100 bytes one had 2.5 or fewer, of those with 50 bytes 26 (measured)."""

_MODEL_KNOBS = list(ModelConfig.model_fields)
_MOE_KNOBS = _MODEL_KNOBS[_MODEL_KNOBS.index("use_moe") + 1 :]
"""The knobs of a mixture of experts: all that are declared after `use_moe`."""

CODES = frozenset(
    {
        "prefix_longer_than_text",
        "continuation_slides",
        "val_fraction_rounded",
        "warmup_beyond_end",
        "tokenizer_far_from_text",
        "router_starved",
        "more_experts_than_tokens",
        "capacity_below_one",
        "moe_settings_unused",
        "settings_unused",
    }
)
"""Every code of `config_warnings`: what it says once the text is tokenised takes the place of what it said before."""

Warn = Callable[[str, str], None]


def config_warnings(
    config: JobConfig, plan: Plan | None, *, n_bytes: int, vocab_size: int | None
) -> list[ConfigWarning]:
    """The traps of `config` on a text of `n_bytes` bytes of UTF-8, at most one of each code.

    `plan` and `vocab_size` None: the text is not tokenised yet, and what depends on its tokens is not judged.
    """
    found: list[ConfigWarning] = []

    def warn(code: str, message: str) -> None:
        found.append(ConfigWarning(code=code, message=message))

    if plan is not None:
        _warn_of_the_text(config, plan, warn)
        if vocab_size is not None:
            _warn_of_the_tokenizer(config, plan, n_bytes, vocab_size, warn)
    _warn_of_sliding(config, plan, warn)
    if config.use_moe:
        _warn_of_router_traps(config, plan, warn)
    found += unused_moe_settings(config)
    if unused := _unused(config, plan):
        warn("settings_unused", f"these do nothing: {'; '.join(unused)}")
    return found


def unused_moe_settings(config: ModelConfig) -> list[ConfigWarning]:
    """One warning of the knobs of a mixture that a dense model was given; empty for a mixture."""
    unused = [] if config.use_moe else [name for name in _MOE_KNOBS if _is_changed(config, name)]
    if not unused:
        return []
    message = f"use_moe is false, so these do nothing: {', '.join(sorted(unused))}"
    return [ConfigWarning(code="moe_settings_unused", message=message)]


def _is_changed(config: ModelConfig, name: str) -> bool:
    return bool(getattr(config, name) != type(config).model_fields[name].default)


def _warn_of_the_text(config: JobConfig, plan: Plan, warn: Warn) -> None:
    if config.cont_prefix_tokens >= plan.n_train_tokens:
        warn(
            "prefix_longer_than_text",
            f"cont_prefix_tokens is {config.cont_prefix_tokens}, but the text has {plan.n_train_tokens} tokens"
            f"{' to train on' if plan.n_val_tokens else ''}: all of it is the prompt, and nothing of it is left to "
            "compare the continuation with",
        )
    n_tokens = plan.n_train_tokens + plan.n_val_tokens
    if config.val_fraction * n_tokens < plan.n_val_tokens:
        warn(
            "val_fraction_rounded",
            f"val_fraction {config.val_fraction:g} of {n_tokens} tokens is {config.val_fraction * n_tokens:.2g}: "
            f"{plan.n_val_tokens} are held out, the fewest that can be",
        )
    if config.warmup_steps > plan.total_steps:
        highest = config.lr * plan.total_steps / config.warmup_steps
        warn(
            "warmup_beyond_end",
            f"warmup_steps is {config.warmup_steps:,}, but training ends after {plan.total_steps:,} steps: "
            f"the learning rate comes to {highest:.3g}, never to lr {config.lr:g}",
        )


def _warn_of_the_tokenizer(config: JobConfig, plan: Plan, n_bytes: int, vocab_size: int, warn: Warn) -> None:
    if config.init_from is not None or config.tokenizer.startswith("train:") or vocab_size == MIN_VOCAB_SIZE:
        return  # a parent's cannot be changed; the others fit every text as well as they can
    n_tokens = plan.n_train_tokens + plan.n_val_tokens
    if n_bytes >= MIN_JUDGED_BYTES and n_bytes / n_tokens <= MIN_BYTES_PER_TOKEN:
        warn(
            "tokenizer_far_from_text",
            f"{config.tokenizer} was made for other texts: a token holds {n_bytes / n_tokens:.2f} bytes of this one, "
            "where ptbr-8k holds 3.8 of Portuguese prose. The tokenizer train:N learns N entries from the text itself; "
            "bytes has 256, for any text",
        )


def _warn_of_sliding(config: JobConfig, plan: Plan | None, warn: Warn) -> None:
    n_prompt = config.cont_prefix_tokens if plan is None else min(config.cont_prefix_tokens, plan.n_train_tokens)
    # The last new token is read by nobody.
    if config.cont_max_new_tokens > 0 and n_prompt + config.cont_max_new_tokens - 1 > config.block_size:
        warn(
            "continuation_slides",
            f"prefix and continuation together are longer than block_size {config.block_size}: "
            "the context slides, and the earliest tokens are forgotten",
        )


def _warn_of_router_traps(config: JobConfig, plan: Plan | None, warn: Warn) -> None:
    if config.k == 1 and config.renormalises_gates and config.n_experts > 1:
        warn(
            "router_starved",
            "k = 1 with renormalised gates makes every gate a constant 1: "
            "the language-model loss gives the router no gradient",
        )
    if plan is None:
        return
    n_micro = min(plan.n_windows, config.batch_size) * min(plan.n_train_tokens, config.block_size)
    if config.n_experts > plan.n_train_tokens:
        warn(
            "more_experts_than_tokens",
            f"n_experts is {config.n_experts}, but the text has {plan.n_train_tokens} tokens: some experts see none",
        )
    if config.capacity_factor is not None and config.capacity_factor * n_micro * config.k / config.n_experts < 1:
        warn(
            "capacity_below_one",
            f"capacity_factor {config.capacity_factor:g} gives each expert less than one assignment "
            f"of a micro-batch of {n_micro} tokens; it is rounded up to 1",
        )


def _unused(config: JobConfig, plan: Plan | None) -> list[str]:
    """The knobs that take no effect, each with the reason: `min_lr (lr_schedule is constant)`."""
    found = []
    if config.min_lr > 0 and config.lr_schedule == "constant":
        found.append("min_lr (lr_schedule is constant)")
    if (
        config.eval_interval is not None
        and config.stop_at_perplexity is None
        and config.early_stopping_patience is None
    ):
        found.append("eval_interval (stop_at_perplexity and early_stopping_patience are null)")
    if config.early_stopping_min_delta > 0 and config.early_stopping_patience is None:
        found.append("early_stopping_min_delta (early_stopping_patience is null)")
    if config.use_moe and config.upcycle_noise > 0 and config.init_from is None:
        found.append("upcycle_noise (init_from is null: no expert is a copy)")
    if config.top_k == 1 and config.temperature > 0 and _is_changed(config, "temperature"):
        found.append("temperature (top_k is 1: always the likeliest token)")
    if config.temperature == 0 and config.top_k is not None and config.top_k > 1:
        found.append("top_k (temperature is 0: always the likeliest token)")
    if plan is not None:
        found += _unused_on_the_text(config, plan)
    return found


def _unused_on_the_text(config: JobConfig, plan: Plan) -> list[str]:
    found = []
    interval = config.eval_interval or plan.steps_per_epoch
    if config.early_stopping_patience is not None:
        n_evaluations = (plan.total_steps - 1) // interval
        if n_evaluations <= config.early_stopping_patience:
            found.append(
                f"early_stopping_patience ({n_evaluations:,} evaluations before the end, every {interval:,} steps of "
                f"{plan.total_steps:,}: the first always improves)"
            )
    if config.eval_max_tokens is not None and config.eval_max_tokens >= max(plan.n_train_tokens, plan.n_val_tokens) - 1:
        found.append("eval_max_tokens (the text has no more targets)")
    if config.stop_at_perplexity is not None and interval >= plan.total_steps:
        found.append(f"stop_at_perplexity (looked at every {interval:,} steps, of {plan.total_steps:,} in all)")
    if config.lr_schedule == "cosine" and plan.total_steps - 1 <= config.warmup_steps <= plan.total_steps:
        found.append("lr_schedule (no step is left after warmup_steps)")
    if plan.n_windows == 1 and _is_changed(config, "batch_size"):
        found.append("batch_size (the text is a single window)")
    if config.gradient_accumulation_steps > 1 and plan.n_windows <= config.batch_size:
        found.append("gradient_accumulation_steps (a single micro-batch holds the text)")
    return found
