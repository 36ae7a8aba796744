"""Each metric of a mixture against its definition, on routings small enough to count by hand."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.evaluation.metrics import CardToken, MixtureLayer, MixtureMetrics
from nanomoe.evaluation.moe_metrics import LayerRouting, churn, expert_cards, moe_metrics, moe_warnings
from nanomoe.model.moe import MoE, Routing
from nanomoe.tokenizer import load_tokenizer


def config(n_experts: int, k: int, **changes: Any) -> ModelConfig:
    return ModelConfig(use_moe=True, n_experts=n_experts, k=k, **changes)


def routed(chosen: list[list[int]], probs: list[list[float]], logits: list[list[float]] | None = None) -> LayerRouting:
    zero, probs_TE = torch.zeros(()), torch.tensor(probs)
    routing = Routing(
        logits_TE=torch.tensor(logits) if logits else probs_TE.log(),
        probs_TE=probs_TE,
        chosen_TK=torch.tensor(chosen),
        gates_TK=torch.zeros(len(chosen), len(chosen[0])),
        counts_E=torch.zeros(len(probs[0]), dtype=torch.int64),
        dropped=zero,
        aux_loss=zero,
        z_loss=zero,
    )
    return LayerRouting.of(routing, torch.ones(len(chosen), dtype=torch.bool))


def figures(
    layer: LayerRouting, model: ModelConfig, previous: Tensor | None = None, *, tokens_per_batch: int = 100
) -> MixtureLayer:
    moe = moe_metrics(
        {1: layer},
        model,
        tokens_per_batch=tokens_per_batch,
        previous_choices={} if previous is None else {1: previous},
        train_dropped={},
        router_grad_norms={1: 0.5},
        losses_without=None,
        cards={1: []},
    )
    return moe.layers[0]


UNEVEN = routed(
    [[0, 1], [0, 2], [0, 1], [0, 1]],
    [[0.5, 0.3, 0.2, 0.0], [0.5, 0.1, 0.4, 0.0], [0.7, 0.2, 0.1, 0.0], [0.6, 0.3, 0.1, 0.0]],
    [[0.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4],
)


def test_load_and_importance_are_shares_of_assignments_and_of_probability() -> None:
    found = figures(UNEVEN, config(4, 2))
    assert found.load == [0.5, 0.375, 0.125, 0.0]
    assert found.importance == pytest.approx([0.575, 0.225, 0.2, 0.0])


def test_imbalance_is_told_by_spread_excess_and_entropy() -> None:
    found = figures(UNEVEN, config(4, 2))
    assert found.load_cv == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 4) / 2)  # n = 4, 3, 1, 0; mean 2
    assert found.max_violation == 1.0
    entropy = -sum(p * math.log(p) for p in (0.5, 0.375, 0.125))
    assert found.load_entropy == pytest.approx(entropy / math.log(4))
    assert found.dead_experts == 1


def test_the_routers_entropy_is_the_mean_over_tokens() -> None:
    found = figures(routed([[0], [1]], [[0.5, 0.5], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]), config(2, 1))
    assert found.router_entropy == pytest.approx(0.5)


def test_the_two_losses_are_those_of_the_layer() -> None:
    found = figures(UNEVEN, config(4, 2))
    assert found.aux_loss == pytest.approx(4 * (0.5 * 0.575 + 0.375 * 0.225 + 0.125 * 0.2))
    expected = (3 * math.log(4) ** 2 + (1 + math.log(4)) ** 2) / 4
    assert found.z_loss == pytest.approx(expected)


def test_losses_and_loads_agree_with_the_layers_own_pass() -> None:
    model = config(8, 3, n_embd=16, router_score="sigmoid", capacity_factor=0.9)
    moe = MoE(model)
    moe.init_weights(2, torch.Generator().manual_seed(3))
    with torch.no_grad():
        moe.router.weight.mul_(30)
        _, routing = moe(torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(4)))
    found = figures(LayerRouting.of(routing, torch.ones(40, dtype=torch.bool)), model)
    assert found.aux_loss == pytest.approx(routing.aux_loss.item(), rel=1e-5)
    assert found.z_loss == pytest.approx(routing.z_loss.item(), rel=1e-5)
    assert found.load == pytest.approx((routing.counts_E / 120).tolist())
    assert found.dropped_fraction == pytest.approx(routing.dropped.item() / 120)
    assert found.dropped_fraction > 0


def test_what_a_capacity_would_drop_is_counted_micro_batch_by_micro_batch() -> None:
    whole = figures(UNEVEN, config(4, 2, capacity_factor=0.75))
    halves = figures(UNEVEN, config(4, 2, capacity_factor=0.75), tokens_per_batch=2)
    # Capacity 2 for all four tokens: expert 0 drops 2, expert 1 drops 1. Capacity 1 for each two: 0, 0 and 0, 1 drop.
    assert whole.dropped_fraction == 3 / 8
    assert halves.dropped_fraction == 3 / 8
    alone = figures(UNEVEN, config(4, 2, capacity_factor=0.75), tokens_per_batch=1)
    assert alone.dropped_fraction == 0


def test_what_a_capacity_would_drop_is_counted_in_token_order() -> None:
    # Capacity ceil(0.75 * 4 * 2 / 4) = 2: the third and fourth token lose expert 0, the fourth also expert 1.
    found = figures(UNEVEN, config(4, 2, capacity_factor=0.75))
    assert found.dropped_fraction == 3 / 8
    assert found.unrouted_fraction == 1 / 4
    assert figures(UNEVEN, config(4, 2)).dropped_fraction == 0


def test_churn_compares_each_tokens_experts_with_the_checkpoint_before() -> None:
    now = torch.tensor([[0, 1], [2, 3]])
    assert churn(now, torch.tensor([[1, 0], [3, 2]], dtype=torch.int16)) == 0
    assert churn(now, torch.tensor([[0, 2], [3, 2]], dtype=torch.int16)) == 0.25
    assert churn(now, torch.tensor([[2, 3], [0, 1]], dtype=torch.int16)) == 1
    assert figures(UNEVEN, config(4, 2)).churn is None
    assert figures(UNEVEN, config(4, 2), UNEVEN.chosen_TK).churn == 0


def test_a_single_expert_is_balanced_and_decided() -> None:
    found = figures(routed([[0]] * 3, [[1.0]] * 3, [[2.0]] * 3), config(1, 1))
    assert (found.load_entropy, found.router_entropy) == (1, 0)
    assert (found.load_cv, found.max_violation, found.dead_experts) == (0, 0, 0)
    assert found.aux_loss == 1


def test_only_counted_tokens_count_and_parts_join_to_the_whole() -> None:
    moe = MoE(config(4, 2, n_embd=8, n_head=1))
    moe.init_weights(1, torch.Generator().manual_seed(0))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([True, False, True, True, False, True])
    whole = LayerRouting.of(moe(x[counted])[1], torch.ones(4, dtype=torch.bool))
    parts = zip(x.split(4), counted.split(4), strict=True)
    joined = LayerRouting.join([LayerRouting.of(moe(part)[1], mask) for part, mask in parts])
    model = config(4, 2)
    for name, value in figures(whole, model):
        assert getattr(figures(joined, model), name) == (value if value is None else pytest.approx(value))


def balanced(n_experts: int = 4) -> LayerRouting:
    tokens = range(n_experts)
    probs = [[0.7 if e == t else 0.3 / (n_experts - 1) for e in tokens] for t in tokens]
    return routed([[t] for t in tokens], probs)


def two_layers(first: LayerRouting, second: LayerRouting, model: ModelConfig, **changes: Any) -> MixtureMetrics:
    chosen: dict[str, Any] = {
        "tokens_per_batch": 100,
        "previous_choices": {},
        "train_dropped": {},
        "router_grad_norms": {0: 0.1, 3: 0.3},
        "losses_without": {0: [1.0] * model.n_experts, 3: [2.0] * model.n_experts},
        "cards": {0: [], 3: []},
    }
    return moe_metrics({0: first, 3: second}, model, **(chosen | changes))


def test_every_layer_is_named_and_summed_up_by_mean_and_maximum() -> None:
    moe = two_layers(balanced(), routed([[0]] * 4, [[0.7, 0.1, 0.1, 0.1]] * 4), config(4, 1), train_dropped={0: 0.5})
    assert [layer.layer for layer in moe.layers] == [0, 3]
    assert moe.layers[1].loss_without == [2.0] * 4
    assert (moe.mean.max_violation, moe.max.max_violation) == (1.5, 3)
    assert moe.mean.router_grad_norm == pytest.approx(0.2)
    assert (moe.mean.train_dropped_fraction, moe.max.train_dropped_fraction) == (0.5, 0.5)
    assert moe.mean.churn is moe.max.churn is None
    json.dumps(moe.model_dump(), allow_nan=False)


def codes(moe: MixtureMetrics, *, after_half: bool = True) -> list[str]:
    return [code for code, _ in moe_warnings(moe, after_half=after_half)]


def test_a_healthy_router_raises_no_warning() -> None:
    assert codes(two_layers(balanced(), balanced(), config(4, 1))) == []


def test_a_collapsed_router_is_warned_of_by_name_and_layer() -> None:
    collapsed = routed([[0]] * 4, [[1.0, 0.0, 0.0, 0.0]] * 4, [[900.0, 0, 0, 0]] * 4)
    moe = two_layers(balanced(), collapsed, config(4, 1))
    assert codes(moe) == ["dead_expert", "router_collapsed"]
    assert codes(moe, after_half=False) == ["dead_expert"]
    assert moe_warnings(moe, after_half=True)[0][1].endswith("dead_experts is 3 in layer 3")


def test_an_undecided_router_is_warned_of_after_half_of_training() -> None:
    alike = routed([[0], [1], [2], [3]], [[0.25] * 4] * 4)
    assert codes(two_layers(alike, alike, config(4, 1))) == ["router_undecided"]
    assert codes(two_layers(alike, alike, config(4, 1)), after_half=False) == []


def test_a_router_without_gradient_is_warned_of() -> None:
    moe = two_layers(balanced(), balanced(), config(4, 1), router_grad_norms={0: 0.0, 3: 1e-4})
    assert codes(moe) == ["dead_router"]
    assert "layer 0" in moe_warnings(moe, after_half=True)[0][1]


def test_too_many_dropped_assignments_are_warned_of() -> None:
    tight = config(4, 1, capacity_factor=0.1)
    uneven = routed([[0], [0], [1], [2], [3]], [[0.4, 0.2, 0.2, 0.2]] * 5)
    assert "tokens_dropped" in codes(two_layers(uneven, balanced(), tight))
    assert "tokens_dropped" not in codes(two_layers(uneven, balanced(), tight, train_dropped={0: 0.05, 3: 0.0}))
    assert "tokens_dropped" in codes(two_layers(balanced(), balanced(), tight, train_dropped={0: 0.2, 3: 0.0}))


def test_a_single_expert_raises_no_warning() -> None:
    one = routed([[0]] * 3, [[1.0]] * 3, [[2.0]] * 3)
    assert codes(two_layers(one, one, config(1, 1), router_grad_norms={0: 0.0, 3: 0.0})) == []


def test_an_experts_card_names_the_tokens_it_gets_most() -> None:
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0], [2, 1]])
    found = expert_cards(chosen, [7, 5, 7, 9, 5], 4, load_tokenizer("bytes"), n_tokens=2)
    cards = [[[card.id, card.times] for card in cards] for cards in found]
    assert found[0][0] == CardToken(token="\x07", id=7, times=2)  # noqa: S106 # no password
    assert cards == [[[7, 2], [5, 1]], [[7, 2], [5, 1]], [[5, 2]], []]
