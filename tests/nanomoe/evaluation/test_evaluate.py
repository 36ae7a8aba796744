import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.evaluation.evaluate import MAX_RECONSTRUCTED, Evaluation, evaluate, evaluate_loss
from nanomoe.evaluation.evaluated_text import EvaluatedText, entropy_baselines
from nanomoe.evaluation.metrics import Position
from nanomoe.evaluation.reader import BATCH_BYTES, LOGITS_BYTES, PlainReader
from nanomoe.model.gpt import GPT
from nanomoe.tokenizer import load_tokenizer

TEXT = "a aranha arranha a rã; a rã não arranha a aranha."
BYTES = load_tokenizer("bytes")
START = Position(percent=0, step=0, epoch=0)


def model_and_windows(config: JobConfig, text: str = TEXT) -> tuple[GPT, Windows]:
    model = GPT.build(config, BYTES.vocab_size)
    model.init_weights(3)
    return model, Windows(torch.tensor(BYTES.encode(text)), config.block_size)


WHOLE = 1_000_000
"""More targets than any text of these tests has."""


def evaluated(config: JobConfig, text: str = TEXT, *, max_targets: int = WHOLE, **changes: Any) -> Evaluation:
    model, windows = model_and_windows(config, text)
    arguments: dict[str, Any] = {"position": START, "previous_choices": {}, "train_loss": None, "train_dropped": {}}
    return evaluate(model, EvaluatedText(windows, max_targets), None, BYTES, config, **arguments | changes)


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
    assert evaluate_loss(PlainReader(model), EvaluatedText(windows, WHOLE)) == pytest.approx(metrics.loss, rel=1e-9)


def test_the_loss_of_a_long_text_does_not_depend_on_how_many_windows_are_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small(block_size=8)
    together = evaluated(config, TEXT * 5).metrics
    monkeypatch.setitem(BATCH_BYTES, "cpu", 1)
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 1)
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
        model, EvaluatedText(windows, WHOLE), None, BYTES, small(use_moe=True), position=START,
        previous_choices={}, train_loss=None, train_dropped={},
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
    assert metrics.loss_without[2] == pytest.approx(
        evaluate_loss(PlainReader(model), EvaluatedText(windows, WHOLE)), rel=1e-6
    )


def test_the_router_gradient_is_zero_where_the_gates_are_a_constant() -> None:
    dead = evaluated(small(use_moe=True, k=1, norm_topk_prob=True)).metrics.moe.layers[0]
    alive = evaluated(small(use_moe=True)).metrics.moe.layers[0]
    assert dead.router_grad_norm == pytest.approx(0, abs=1e-9)
    assert alive.router_grad_norm > 1e-4


LONG = TEXT * 60
"""3,180 bytes: more than a reconstruction holds."""


def test_of_a_long_text_the_losses_are_those_of_the_windows_that_are_read() -> None:
    config = small(block_size=8)
    model, windows = model_and_windows(config, LONG)
    text = EvaluatedText(windows, 256)
    metrics = evaluated(config, LONG, max_targets=256).metrics
    losses, guessed, n_bytes = [], 0, 0
    for window in text.windows:
        inputs, targets = windows.batch([window])
        logits = model(inputs).logits_BTV[0].double()
        losses += F.cross_entropy(logits, targets[0], reduction="none").tolist()
        guessed += int((logits.argmax(-1) == targets[0]).sum())
        n_bytes += len(targets[0])
    assert metrics.eval_targets == len(losses) == 256
    assert metrics.loss == pytest.approx(sum(losses) / 256, rel=1e-6)
    assert metrics.accuracy == guessed / 256
    assert metrics.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / n_bytes, rel=1e-6)
    assert metrics.loss_stderr == pytest.approx(text.standard_error(losses), rel=1e-4)
    assert evaluate_loss(PlainReader(model), text) == pytest.approx(metrics.loss, rel=1e-9)
    whole = evaluated(config, LONG).metrics
    assert whole.eval_targets == len(LONG.encode()) - 1
    assert whole.loss_stderr == 0
    assert metrics.loss != whole.loss
    assert metrics.baselines == whole.baselines


def test_the_reconstruction_of_a_long_text_is_that_of_its_beginning_whatever_else_is_read() -> None:
    config = small(block_size=8, use_moe=True, n_experts=4)
    few, all_of_it = (evaluated(config, LONG, max_targets=n).metrics.reconstruction for n in (256, WHOLE))
    assert few is not None
    assert all_of_it is not None
    assert len(few.tokens or ()) == MAX_RECONSTRUCTED
    assert few.truncated
    assert few.text == all_of_it.text
    for one, other in zip(few.tokens or (), all_of_it.tokens or (), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.model_copy(update={"loss": 0.0}) == other.model_copy(update={"loss": 0.0})


def test_the_routing_of_a_long_text_is_that_of_the_positions_that_are_read() -> None:
    config = small(block_size=8, use_moe=True, n_experts=4)
    _, windows = model_and_windows(config, LONG)
    positions = EvaluatedText(windows, 256).positions()
    few, all_of_it = evaluated(config, LONG, max_targets=256), evaluated(config, LONG)
    assert torch.equal(few.choices[1], all_of_it.choices[1][positions])
    (layer,) = few.metrics.moe.layers
    chosen = few.choices[1].flatten().tolist()
    assert layer.load == pytest.approx([chosen.count(e) / len(chosen) for e in range(4)])
    n_routed = [sum(card.times for card in cards) for cards in layer.cards]
    assert sum(n_routed) == len(chosen)
    again = evaluated(config, LONG, max_targets=256, previous_choices=few.choices)
    assert again.metrics.moe.layers[0].churn == 0


class StopAfter:
    """Raises at a call after so many."""

    def __init__(self, n_calls: int) -> None:
        self.left = n_calls

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedError


def test_an_evaluation_can_be_stopped_before_every_batch_token_and_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BATCH_BYTES, "cpu", 1)
    config = small(block_size=8, use_moe=True, n_experts=4)
    asked = StopAfter(WHOLE)
    evaluated(config, raise_if_stopped=asked)
    n_calls = WHOLE - asked.left
    n_windows, n_parts_counted = 7, 3
    assert n_calls == n_windows + n_parts_counted + config.cont_max_new_tokens + config.n_experts
    for n in range(n_calls):
        with pytest.raises(InterruptedError):
            evaluated(config, raise_if_stopped=StopAfter(n))
