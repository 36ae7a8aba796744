"""What a submitted text and config will need, before there is a row."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanomoe.config import JobConfig
from nanomoe.model import size
from nanomoe.tokenizer import Tokenizer, load_tokenizer
from service.errors import Invalid, TooLarge
from service.jobs.submission import TOKENISED_AT_ONCE_BYTES, Assessment, Parent, assess
from service.settings import Settings
from tests.nanomoe.sample_tokenizers import other_meaning

TEXT = "O gato dorme. O rato não."


def assessed(text: str = TEXT, parent: Parent | None = None, limits: dict[str, Any] | None = None,
             **config: Any) -> Assessment:  # fmt: skip
    settings = Settings(_env_file=None, data_dir=Path("unused"), **limits or {})
    return assess(text, JobConfig(**config), settings, parent)


def test_the_figures_are_those_of_the_arithmetic() -> None:
    found = assessed(block_size=5)
    n_tokens = len(load_tokenizer("ptbr-8k").encode(TEXT))
    config = found.config
    assert found.n_tokens == n_tokens
    assert found.n_bytes == len(TEXT.encode())
    assert found.plan is not None
    assert found.plan.n_windows == -(-(n_tokens - 1) // 5)
    assert found.sizes.n_params == size.n_params(config, 8192)
    assert found.sizes.training_bytes == size.training_bytes(config, 8192, n_tokens)
    # A worker that has less than the peak may still train it, cut into smaller micro-batches.
    least = size.least_training_bytes(config, 8192, n_tokens)
    assert found.sizes.training_bytes > least == found.new_job().training_bytes


def test_a_job_has_a_shape_once_its_tokens_are_counted() -> None:
    found = assessed(lr=1e-3)
    assert found.new_job().cohort_key == found.cohort_key == assessed(lr=5e-3, seed=7).cohort_key is not None
    assert assessed(n_embd=64).cohort_key not in (None, found.cohort_key)
    assert assessed("a " * TOKENISED_AT_ONCE_BYTES).cohort_key is None


def test_a_trained_tokenizer_counts_with_the_entries_it_has() -> None:
    found = assessed(tokenizer="train:1000")
    assert found.sizes.n_params is not None
    assert found.sizes.n_params < size.n_params(found.config, 1000)


def test_a_limit_is_judged_by_the_entries_that_a_trained_tokenizer_has() -> None:
    found = assessed(tokenizer="train:65536", limits={"max_params": 1_000_000})
    assert found.sizes.n_params is not None
    assert found.sizes.n_params < 1_000_000 < size.n_params(found.config, 65_536)
    with pytest.raises(Invalid) as refused:
        assessed(tokenizer="train:65536", limits={"max_params": found.sizes.n_params - 1})
    assert f"{found.sizes.n_params:,} parameters" in refused.value.detail


def test_the_size_of_a_tokenizer_that_is_trained_later_is_not_promised() -> None:
    found = assessed("ab " * TOKENISED_AT_ONCE_BYTES, tokenizer="train:1000")
    assert (found.sizes.n_params, found.sizes.n_active_params, found.sizes.flops_per_token) == (None, None, None)
    at_most = size.training_bytes(found.config, 1000, found.n_bytes)
    assert found.sizes.training_bytes == at_most
    with pytest.raises(Invalid):
        assessed("ab " * TOKENISED_AT_ONCE_BYTES, tokenizer="train:1000", limits={"max_training_bytes": at_most - 1})


def test_a_long_text_is_measured_by_its_bytes() -> None:
    text = "ab " * TOKENISED_AT_ONCE_BYTES
    found = assessed(text, tokenizer="bytes")
    assert (found.n_tokens, found.plan) == (None, None)
    assert found.sizes.training_bytes == size.training_bytes(found.config, 256, len(text))


def test_a_size_that_is_absurd_is_refused_before_a_tokenizer_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr("service.jobs.submission.load_tokenizer", fail)
    with pytest.raises(Invalid) as refused:
        assessed(tokenizer="train:5000", n_embd=65_536, n_layer=256)
    assert refused.value.code == "job_too_large"
    assert "2,000,000,000" in refused.value.detail


def test_every_limit_that_is_passed_is_named() -> None:
    with pytest.raises(Invalid) as refused:
        assessed(tokenizer="bytes", limits={"max_training_bytes": 10, "max_steps": 5})
    assert [error["msg"].split(" ", 1)[1].split(",")[0] for error in refused.value.errors] == [
        "bytes of memory for training",
        "optimizer steps",
    ]


def test_a_text_is_measured_in_bytes_and_not_in_characters() -> None:
    assessed("é" * 50, limits={"max_text_bytes": 100})
    with pytest.raises(TooLarge):
        assessed("é" * 51, limits={"max_text_bytes": 100})


def test_a_text_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(Invalid) as refused:
        assessed("abc", tokenizer="bytes", val_fraction=0.5)
    assert refused.value.code == "text_too_short"


def test_traps_are_told() -> None:
    found = assessed("abc", tokenizer="bytes", use_moe=True, k=1, norm_topk_prob=True)
    codes = {warning.code for warning in found.warnings}
    assert {"prefix_longer_than_text", "router_starved", "more_experts_than_tokens"} <= codes


@pytest.mark.parametrize("change", [{"n_layer": 2}, {"block_size": 150}, {"bias": False}, {"tokenizer": "ptbr-8k"}])
def test_weights_of_another_shape_are_no_start(change: dict[str, Any]) -> None:
    parent = Parent("0" * 32, JobConfig(tokenizer="bytes"), load_tokenizer("bytes"), "")
    assessed(parent=parent, tokenizer="bytes", epochs=5, dropout=0.0)
    with pytest.raises(Invalid) as refused:
        assessed(parent=parent, **({"tokenizer": "bytes"} | change))
    assert refused.value.code == "parent_does_not_fit"
    assert next(iter(change)) in refused.value.detail


def codes(found: Assessment) -> list[str]:
    return [warning.code for warning in found.warnings]


def parent_of(tokenizer: Tokenizer, text: str = "outro texto") -> Parent:
    return Parent("0" * 32, JobConfig(tokenizer=tokenizer.name), tokenizer, hashlib.sha256(text.encode()).hexdigest())


def test_a_child_is_told_when_its_parents_tokenizer_is_another_than_the_name_gives_today() -> None:
    bundled = load_tokenizer("ptbr-8k")
    short = {"cont_prefix_tokens": 2}
    assert codes(assessed(parent=parent_of(bundled), **short)) == []
    assert codes(assessed(parent=parent_of(other_meaning(bundled)), **short)) == ["tokenizer_of_parent"]
    trained = load_tokenizer("train:300", text=TEXT)
    assert codes(assessed(parent=parent_of(trained, TEXT), tokenizer="train:300", **short)) == []
    assert codes(assessed(parent=parent_of(trained), tokenizer="train:300", **short)) == ["tokenizer_of_parent"]
    assert codes(assessed(parent=parent_of(load_tokenizer("bytes")), tokenizer="bytes", **short)) == []


def test_a_tokenizer_is_the_parents_by_what_its_files_say_and_not_by_its_name(tmp_path: Path) -> None:
    bundled = load_tokenizer("ptbr-8k")
    for name, tokenizer in (("same", bundled), ("other", other_meaning(bundled))):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
    here = {"tokenizer_dir": tmp_path}
    assert assessed(parent=parent_of(bundled), limits=here, tokenizer="same").n_tokens == len(bundled.encode(TEXT))
    with pytest.raises(Invalid) as refused:
        assessed(parent=parent_of(bundled), limits=here, tokenizer="other")
    assert "tokenizer is 'other', the parent's 'ptbr-8k'" in refused.value.detail


def test_noise_for_copies_that_are_not_made_is_told() -> None:
    parent = parent_of(load_tokenizer("ptbr-8k"))
    parent = replace(parent, config=JobConfig(use_moe=True))
    assert "upcycle_noise_unused" in codes(assessed(parent=parent, use_moe=True, upcycle_noise=0.1))
