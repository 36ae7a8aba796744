"""The traps of legal configs: each is told once it is known, and none that nobody earned."""

from typing import Any

import pytest

from nanomoe.config import ConfigWarning, InitFrom, JobConfig
from nanomoe.config_warnings import CODES, MIN_JUDGED_BYTES, config_warnings
from nanomoe.plan import Plan
from nanomoe.tokenizer import load_tokenizer

PARENT = {"job_id": "0" * 32}


def warned(n_tokens: int | None = 87, n_bytes: int = 336, vocab_size: int = 8192, **config: Any) -> list[ConfigWarning]:
    """Of a config on the example paragraph, or on a text of another size."""
    parsed = JobConfig.model_validate(config, strict=False)
    plan = None if n_tokens is None else Plan.of(parsed, n_tokens)
    return config_warnings(parsed, plan, n_bytes=n_bytes, vocab_size=vocab_size)


TRAPS: list[tuple[dict[str, Any], str, str]] = [
    ({"cont_prefix_tokens": 90, "cont_max_new_tokens": 5}, "prefix_longer_than_text", "90"),
    ({"cont_prefix_tokens": 80, "val_fraction": 0.1, "cont_max_new_tokens": 5}, "prefix_longer_than_text", "79 tokens"),
    ({"cont_max_new_tokens": 95}, "continuation_slides", "block_size 100"),
    ({"val_fraction": 0.01}, "val_fraction_rounded", "0.01 of 87 tokens is 0.87: 2"),
    ({"warmup_steps": 1000}, "warmup_beyond_end", "after 500 steps: the learning rate comes to 5e-05"),
    ({"warmup_steps": 11, "max_steps": 10}, "warmup_beyond_end", "after 10 steps"),
    ({"use_moe": True, "k": 1, "norm_topk_prob": True}, "router_starved", "k = 1"),
    ({"use_moe": True, "n_experts": 128}, "more_experts_than_tokens", "87 tokens"),
    ({"use_moe": True, "n_experts": 85, "val_fraction": 0.05}, "more_experts_than_tokens", "83 tokens"),
    ({"use_moe": True, "capacity_factor": 0.01}, "capacity_below_one", "87 tokens"),
    ({"n_experts": 4}, "moe_settings_unused", "n_experts"),
    ({"capacity_factor": 1.0, "n_experts": 8}, "moe_settings_unused", "do nothing: capacity_factor"),
    ({"min_lr": 1e-5}, "settings_unused", "min_lr (lr_schedule is constant)"),
    (
        {"eval_interval": 5},
        "settings_unused",
        "eval_interval (stop_at_perplexity and early_stopping_patience are null)",
    ),
    (
        {"early_stopping_min_delta": 0.1},
        "settings_unused",
        "early_stopping_min_delta (early_stopping_patience is null)",
    ),
    (
        {"early_stopping_patience": 4, "val_fraction": 0.03, "eval_interval": 100},
        "settings_unused",
        "early_stopping_patience (4 evaluations before the end, every 100 steps of 500",
    ),
    ({"eval_max_tokens": 256}, "settings_unused", "eval_max_tokens (the text has no more targets)"),
    ({"stop_at_perplexity": 2.0, "eval_interval": 500}, "settings_unused", "stop_at_perplexity (looked at every 500"),
    ({"stop_at_perplexity": 2.0, "epochs": 1}, "settings_unused", "stop_at_perplexity"),
    ({"lr_schedule": "cosine", "warmup_steps": 499}, "settings_unused", "lr_schedule"),
    ({"use_moe": True, "upcycle_noise": 0.1}, "settings_unused", "upcycle_noise"),
    ({"temperature": 1.0}, "settings_unused", "temperature (top_k is 1"),
    ({"temperature": 0, "top_k": 5}, "settings_unused", "top_k (temperature is 0"),
    ({"batch_size": 4}, "settings_unused", "batch_size (the text is a single window)"),
    ({"gradient_accumulation_steps": 4}, "settings_unused", "gradient_accumulation_steps"),
]


@pytest.mark.parametrize(("config", "code", "said"), TRAPS)
def test_a_legal_trap_gets_a_warning_with_its_figures(config: dict[str, Any], code: str, said: str) -> None:
    (found,) = warned(**config)
    assert found.code == code
    assert code in CODES
    assert said in found.message
    # A row, a checkpoint's config.json and the trainer name every field.
    assert warned(**JobConfig.model_validate(config, strict=False).model_dump()) == [found]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_moe": True},
        {"n_experts": 8, "k": 2, "capacity_factor": None},
        {"lr_schedule": "cosine", "min_lr": 1e-5, "warmup_steps": 100},
        {"warmup_steps": 500},
        {"stop_at_perplexity": 2.0},
        {"stop_at_perplexity": 2.0, "eval_interval": 499},
        {"val_fraction": 0.03},
        {"val_fraction": 0.03, "early_stopping_patience": 3, "eval_interval": 100, "early_stopping_min_delta": 0.1},
        {"temperature": 1.0, "top_k": None},
        {"temperature": 0},
        {"temperature": 0, "top_k": None},
        {"block_size": 34},  # the last of the 25 new tokens is read by nobody
        {"block_size": 5, "cont_max_new_tokens": 0},
        {"block_size": 10, "cont_prefix_tokens": 5, "cont_max_new_tokens": 5, "batch_size": 2},
        {"block_size": 10, "cont_prefix_tokens": 5, "cont_max_new_tokens": 5, "batch_size": 2,
         "gradient_accumulation_steps": 2},
        {"use_moe": True, "upcycle_noise": 0.1, "init_from": InitFrom(**PARENT)},
    ],
)  # fmt: skip
def test_what_is_no_trap_gets_none_whether_every_field_is_written_down_or_few(config: dict[str, Any]) -> None:
    assert warned(**config) == []
    assert warned(**JobConfig.model_validate(config, strict=False).model_dump()) == []


def test_every_code_is_declared() -> None:
    assert {code for _, code, _ in TRAPS} | {"tokenizer_far_from_text"} == CODES


def test_an_unknown_length_gives_no_warning_about_the_length() -> None:
    assert warned(None, use_moe=True, n_experts=128, cont_prefix_tokens=20, warmup_steps=10**6, batch_size=1) == []


ENGLISH = "The king of Rome had a robe, and a rat gnawed it; the queen, in a rage, resolved to mend what was left. " * 2
PORTUGUESE = (
    "O rei de Roma tinha uma roupa, e um rato a roeu; a rainha, com raiva, resolveu remendar o que sobrou. " * 2
)


def judged(text: str, tokenizer: str = "ptbr-8k", **config: Any) -> list[str]:
    loaded = load_tokenizer(tokenizer, text=text)
    found = warned(
        len(loaded.encode(text)), len(text.encode()), loaded.vocab_size, tokenizer=tokenizer, epochs=1, **config
    )
    return [warning.message for warning in found if warning.code == "tokenizer_far_from_text"]


@pytest.mark.parametrize(
    "text",
    [ENGLISH, "Жил-был царь, и была у него мантия. " * 4, "从前有座山,山里有座庙。" * 5, "3,14159 2,71828\n" * 9],
)
def test_a_tokenizer_made_for_other_texts_is_told_with_what_would_fit(text: str) -> None:
    (message,) = judged(text)
    assert "train:N" in message
    assert "bytes has 256" in message
    for fitting in ("bytes", "train:300"):
        assert judged(text, fitting) == []
    assert judged(text, init_from=InitFrom(**PARENT)) == []  # a parent's tokenizer cannot be changed


@pytest.mark.parametrize("text", [PORTUGUESE, ENGLISH[: MIN_JUDGED_BYTES - 1], "1 2 3"])
def test_a_tokenizer_that_fits_or_a_text_too_short_to_tell_is_no_trap(text: str) -> None:
    assert judged(text) == []
