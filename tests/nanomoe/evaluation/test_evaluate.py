import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.evaluation.evaluate import Evaluation, entropy_baselines, evaluate, evaluate_loss
from nanomoe.evaluation.metrics import Position
from nanomoe.model.gpt import GPT
from nanomoe.tokenizer import load_tokenizer

TEXT = "a aranha arranha a rã; a rã não arranha a aranha."
BYTES = load_tokenizer("bytes")
START = Position(percent=0, step=0, epoch=0)


def model_and_windows(config: JobConfig, text: str = TEXT) -> tuple[GPT, Windows]:
    model = GPT.build(config, BYTES.vocab_size)
    model.init_weights(3)
    return model, Windows(torch.tensor(BYTES.encode(text)), config.block_size)


def evaluated(config: JobConfig, text: str = TEXT, **changes: Any) -> Evaluation:
    model, windows = model_and_windows(config, text)
    arguments: dict[str, Any] = {"position": START, "previous_choices": {}, "train_loss": None, "train_dropped": {}}
    return evaluate(model, windows, None, BYTES, config, **arguments | changes)


def small(**changes: Any) -> JobConfig:
    return JobConfig.model_validate(
        {"tokenizer": "bytes", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 100} | changes
    )


def test_loss_accuracy_and_bits_per_byte_are_those_of_the_plain_formulas() -> None:
    model, windows = model_and_windows(small())
    tokens = torch.tensor(BYTES.encode(TEXT))
    logits = model(tokens[None]).logits_BTV[0, :-1].double()
    loss = F.cross_entropy(logits, tokens[1:]).item()
    metrics = evaluated(small()).metrics
    assert metrics.loss == pytest.approx(loss, rel=1e-6)
    assert metrics.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert metrics.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-6)
    assert metrics.accuracy == pytest.approx((logits.argmax(-1) == tokens[1:]).double().mean().item())
    assert evaluate_loss(model, windows) == pytest.approx(metrics.loss, rel=1e-9)


def test_the_loss_of_a_long_text_does_not_depend_on_how_many_windows_are_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small(block_size=8)
    together = evaluated(config, TEXT * 5).metrics
    monkeypatch.setattr("nanomoe.evaluation.evaluate.LOGITS_BYTES", 1)
    alone = evaluated(config, TEXT * 5).metrics
    assert alone.loss == pytest.approx(together.loss, rel=1e-6)
    assert len(alone.reconstruction.tokens) == len((TEXT * 5).encode()) - 1


def test_a_reconstruction_names_every_target_with_its_place_in_the_text() -> None:
    reconstruction = evaluated(small()).metrics.reconstruction
    text = TEXT.encode()
    assert not reconstruction.truncated
    assert [t.id for t in reconstruction.tokens] == list(text[1:])
    assert [t.byte_offset for t in reconstruction.tokens] == list(range(1, len(text)))
    assert [reconstruction.tokens[0].input, reconstruction.tokens[0].target] == ["a", " "]
    assert all("experts" not in t.model_fields_set for t in reconstruction.tokens)


def test_a_reconstruction_of_a_long_text_stops_at_its_limit_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanomoe.evaluation.evaluate.MAX_RECONSTRUCTED", 10)
    reconstruction = evaluated(small()).metrics.reconstruction
    assert reconstruction.truncated
    assert len(reconstruction.tokens) == 10


def test_a_continuation_starts_from_the_first_tokens_of_the_text() -> None:
    continuation = evaluated(small(cont_prefix_tokens=8, cont_max_new_tokens=5)).metrics.continuation
    assert continuation.prompt == "a aranha"
    assert len(continuation.text) >= 1


def test_the_baselines_are_the_entropies_of_the_text() -> None:
    tokens = [0, 1, 0, 2, 0, 1]
    baselines = entropy_baselines(tokens, 10)
    assert baselines.uniform == pytest.approx(math.log(10))
    shares = [c / 5 for c in Counter(tokens[1:]).values()]
    assert baselines.unigram == pytest.approx(-sum(s * math.log(s) for s in shares))
    # After 0 come 1, 2, 1; after 1 and 2 always 0.
    assert baselines.bigram == pytest.approx(3 / 5 * -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))


def test_evaluation_leaves_the_model_in_the_mode_it_was_in_and_without_gradients() -> None:
    model, windows = model_and_windows(small(use_moe=True))
    model.train()
    evaluate(
        model, windows, None, BYTES, small(use_moe=True), position=START, previous_choices={}, train_loss=None,
        train_dropped={},
    )  # fmt: skip
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_metrics_of_a_mixture_cover_every_layer_and_token() -> None:
    config = small(use_moe=True, moe_stride=1, n_experts=4)
    evaluation = evaluated(config, train_dropped={0: 0.0, 1: 0.25})
    n_targets = len(TEXT.encode()) - 1
    tokens = evaluation.metrics.reconstruction.tokens
    assert all(len(t.experts) == 2 and all(len(set(layer)) == 2 for layer in t.experts) for t in tokens)
    assert {layer: tuple(c.shape) for layer, c in evaluation.choices.items()} == {0: (n_targets, 2), 1: (n_targets, 2)}
    layers = evaluation.metrics.moe.layers
    counts = Counter(expert for t in tokens for expert in t.experts[0])
    assert layers[0].load == pytest.approx([counts[e] / (2 * n_targets) for e in range(4)])
    assert evaluation.metrics.moe.max.train_dropped_fraction == 0.25


@pytest.mark.parametrize("block_size", [100, 8])
def test_the_experts_of_a_position_are_those_its_input_token_is_routed_to(block_size: int) -> None:
    config = small(use_moe=True, moe_stride=1, n_experts=8, block_size=block_size)
    model, windows = model_and_windows(config)
    evaluation = evaluated(config)
    positions = evaluation.metrics.reconstruction.tokens
    tokens = BYTES.encode(TEXT)
    assert [BYTES.decode([token]) for token in tokens[:-1]] == [position.input for position in positions]
    start = 0
    for window in range(windows.count):
        first = windows.start(window)
        context = torch.tensor([tokens[first : first + windows.length]])
        routings = model.eval()(context).routings
        for at in range(start, min(first + windows.length, len(tokens) - 1)):
            # Nothing after the input has a part in it: the router sees the text up to there.
            seen = model(context[:, : at - first + 1]).routings
            expected = [seen[layer].chosen_TK[-1].tolist() for layer in routings]
            assert positions[at].experts == expected
            assert [evaluation.choices[layer][at].tolist() for layer in routings] == expected
            start = at + 1
    assert start == len(positions)
    assert len({str(position.experts) for position in positions}) > 5  # else any position would do


def test_the_loss_without_an_expert_is_that_of_a_model_whose_expert_answers_zero() -> None:
    config = small(use_moe=True, n_experts=3)
    model, windows = model_and_windows(config)
    metrics = evaluated(config).metrics.moe.layers[0]
    moe = model.moe_layers[1]
    with torch.no_grad():
        moe.experts.w_out[2] = 0
        if moe.experts.b_out is not None:
            moe.experts.b_out[2] = 0
    assert metrics.loss_without[2] == pytest.approx(evaluate_loss(model, windows), rel=1e-6)


def test_the_router_gradient_is_zero_where_the_gates_are_a_constant() -> None:
    dead = evaluated(small(use_moe=True, k=1, norm_topk_prob=True)).metrics.moe.layers[0]
    alive = evaluated(small(use_moe=True)).metrics.moe.layers[0]
    assert dead.router_grad_norm == pytest.approx(0, abs=1e-9)
    assert alive.router_grad_norm > 1e-4
