"""The measurement itself: everybody does the same work, and what is printed follows from it."""

import pytest
import torch

from nanomoe.bench import generation, models, peers
from nanomoe.config import SamplingConfig
from nanomoe.generation.engine import Engine, Request
from nanomoe.model.size import n_active_params


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_STEPS", 10)
    monkeypatch.setattr(generation, "_MOST_NEW_TOKENS", 8)


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_nanogpts_loop_and_transformers_continue_as_the_engine_does(name: str) -> None:
    tokenizer = models.tokenizer_of(8200)
    model = models.trained(name, tokenizer)
    prompt = tokenizer.encode(models.paragraph())[:10]
    greedy = SamplingConfig(top_k=1)
    engine = Engine(model.state_dict(), model.config)
    expected = engine.run([Request(prompt, 20, SamplingConfig(temperature=0))])[0].tokens
    contenders = [peers.nanogpt(model)]
    if name == "dense":  # transformers has no such mixture: its peer has other weights
        contenders.append(peers.transformers_cached(model))
    for extend in contenders:
        assert extend(torch.tensor([prompt, prompt]), 20, greedy).tolist() == [expected, expected]


def test_a_token_meets_as_many_parameters_in_the_mixture_of_transformers() -> None:
    model = models.untrained("mixture", 8192)
    theirs = peers._mixtral(model)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    in_experts = sum(p.numel() for name, p in theirs.named_parameters() if ".experts." in name)
    met = sum(p.numel() for p in theirs.parameters()) - in_experts * (1 - model.config.k / model.config.n_experts)
    assert in_experts > 0
    assert met == pytest.approx(n_active_params(model.config, 8192), rel=0.03)
    assert peers.transformers_cached(model)(torch.tensor([[1, 2, 3]]), 5, SamplingConfig(top_k=10)).shape == (1, 8)


def test_figures_follow_from_the_turns() -> None:
    figures = generation.measure("mixture", 8192, at_once=(1, 3), turns=1, with_transformers=False)
    assert [(speed.sampling, speed.at_once) for speed in figures.speeds] == [
        ("top_k 1", 1), ("top_k 1", 3), ("top_k 200", 1), ("top_k 200", 3),
    ]  # fmt: skip
    for speed in figures.speeds:
        assert speed.new_tokens == 8
        assert speed.ratio["nanogpt"] == pytest.approx(speed.tok_per_sec["nanomoe"] / speed.tok_per_sec["nanogpt"])
    assert figures.limit_tok_per_sec == figures.read_bytes_per_sec / (4 * figures.n_active_params)
    assert figures.first_token_seconds.keys() == {"nanomoe", "nanogpt"}
    assert "compiled loops" in figures.numerics


def test_the_vocabulary_is_as_large_as_asked_and_encodes_as_before() -> None:
    tokenizer = models.tokenizer_of(9000)
    assert tokenizer.vocab_size == 9000
    assert tokenizer.decode(tokenizer.encode(models.paragraph())) == models.paragraph()
    assert max(tokenizer.encode(models.paragraph())) < 8192
