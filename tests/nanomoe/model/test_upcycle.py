"""A dense model grown into a mixture: its first logits, and what may not grow."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.lineage import misfits, upcycle_warning
from nanomoe.model.gpt import GPT
from nanomoe.model.moe import MoE
from nanomoe.model.upcycle import starting_weights

IDS = torch.arange(24).view(2, 12)


def dense_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**({"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12} | changes))


def grown_config(**changes: Any) -> ModelConfig:
    return dense_config(**({"use_moe": True, "n_experts": 4} | changes))


def trained(config: ModelConfig) -> GPT:
    """A model in float64 whose every weight is set, biases too."""
    model = GPT(config, 30).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model.eval()


def grow(parent: GPT, config: ModelConfig, seed: int = 0) -> GPT:
    model = GPT(config, 30).double()
    model.load_state_dict(starting_weights(parent.state_dict(), config, seed=seed))
    return model.eval()


def logits(model: GPT) -> Tensor:
    return model(IDS).logits_BTV.detach()


def is_equal(parent: GPT, child: GPT) -> bool:
    return torch.allclose(logits(parent), logits(child), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k": 4},
        {"moe_stride": 1, "n_experts": 7, "k": 3},
        {"k": 1, "norm_topk_prob": True},
        {"n_experts": 1, "k": 1},
        {"router_score": "sigmoid"},
        {"expert_hidden_ratio": 8.0},
        {"n_shared_experts": 2},
        {"n_shared_experts": 1, "expert_hidden_ratio": 8.0},
        {"router_noise": True, "router_bias_update_rate": 0.1},
        {"capacity_factor": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_grown_model_begins_with_its_parents_logits(changes: dict[str, Any], bias: bool) -> None:
    parent, config = trained(dense_config(bias=bias)), grown_config(bias=bias, **changes)
    assert upcycle_warning(config, parent.config) is None
    assert is_equal(parent, grow(parent, config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_topk_prob": False}, "gates do not sum to 1"),
        ({"k": 1}, "gates do not sum to 1"),
        ({"n_experts": 1, "k": 1, "router_score": "sigmoid"}, "gates do not sum to 1"),
        ({"expert_hidden_ratio": 2.0}, "32 hidden channels hold no whole copy"),
        ({"expert_hidden_ratio": 6.0}, "96 hidden channels hold no whole copy"),
        ({"upcycle_noise": 0.1}, "upcycle_noise is 0.1"),
    ],
    ids=str,
)
def test_a_growth_that_changes_the_logits_is_warned_of(changes: dict[str, Any], reason: str) -> None:
    parent, config = trained(dense_config()), grown_config(**changes)
    warning = upcycle_warning(config, parent.config)
    assert warning is not None
    assert warning.code == "upcycle_not_equal"
    assert reason in warning.message
    assert not is_equal(parent, grow(parent, config))


def moe_of(model: GPT) -> MoE:
    return model.moe_layers[1]


def test_narrow_experts_divide_the_mlp_among_them() -> None:
    parent = trained(dense_config())
    moe = moe_of(grow(parent, grown_config(expert_hidden_ratio=1.0, k=4)))
    fc = parent.state_dict()["transformer.h.1.mlp.c_fc.weight"]
    assert torch.equal(torch.cat(list(moe.experts.w_in), 1).T, fc)


def test_noise_parts_the_experts_in_units_of_each_weight() -> None:
    parent = trained(dense_config())
    exact, noisy = (moe_of(grow(parent, grown_config(upcycle_noise=noise))) for noise in (0.0, 0.5))
    for name in ("w_in", "w_out"):
        copy, perturbed = exact.experts.get_parameter(name), noisy.experts.get_parameter(name)
        assert torch.equal(copy[0], copy[1])
        assert not torch.equal(perturbed[0], perturbed[1])
        assert (perturbed - copy).std().item() == pytest.approx(0.5 * copy.std().item(), rel=0.05)


def test_routers_follow_from_the_seed_and_share_the_tokens_at_once() -> None:
    parent, config = trained(dense_config()), grown_config(moe_stride=1)
    first, again, other = (grow(parent, config, seed).state_dict() for seed in (3, 3, 4))
    for name in ("transformer.h.0.mlp.router.weight", "transformer.h.1.mlp.router.weight"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert first[name].std().item() == pytest.approx(0.02, rel=0.3)
    assert (moe_of(grow(parent, config))(torch.randn(1, 99, 16).double())[1].counts_E > 0).all()


def test_a_grown_model_learns_in_every_part() -> None:
    model = grow(trained(dense_config()), grown_config(n_shared_experts=1, upcycle_noise=0.01))
    model(IDS).logits_BTV.square().sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # What lies before a zero matrix learns once that has moved.
    assert frozen == {"transformer.h.1.mlp.shared.w_in", "transformer.h.1.mlp.shared.b_in"}


def test_dense_weights_go_on_as_they_are() -> None:
    parent = trained(dense_config())
    weights = starting_weights(parent.state_dict(), dense_config(dropout=0.0), seed=0)
    assert weights.keys() == parent.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in parent.state_dict().items())


def test_a_mixture_goes_on_and_may_take_up_or_leave_noise_and_balance_bias() -> None:
    parent = trained(grown_config())
    changed = grown_config(router_noise=True, router_bias_update_rate=0.1, k=2)
    grown = grow(parent, changed)
    assert is_equal(parent, grown)
    assert is_equal(parent, grow(grown, grown_config()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_experts": 8}, "n_experts is 8, the parent's 4"),
        ({"expert_hidden_ratio": 2.0}, "expert_hidden_ratio is 2.0, the parent's 4.0"),
        ({"moe_stride": 1}, "moe_stride is 1, the parent's 2"),
        ({"n_shared_experts": 1}, "n_shared_experts is 1, the parent's 0"),
        ({"n_embd": 32}, "n_embd is 32, the parent's 16"),
        ({"use_moe": False}, "a mixture cannot become one MLP"),
    ],
    ids=str,
)
def test_a_mixture_of_another_shape_does_not_fit(changes: dict[str, Any], reason: str) -> None:
    (found,) = misfits(grown_config(**changes), grown_config())
    assert reason in found


def test_a_dense_parent_fits_any_mixture_of_its_width() -> None:
    parent = dense_config()
    assert misfits(grown_config(n_experts=64, expert_hidden_ratio=1.0, n_shared_experts=3), parent) == []
    assert misfits(grown_config(k=1, router_noise=True), grown_config()) == []
    assert misfits(grown_config(bias=False), parent) == ["bias is False, the parent's True"]
    assert misfits(dense_config(block_size=13, tokenizer="bytes"), parent) == [
        "tokenizer is 'bytes', the parent's 'ptbr-8k'",
        "block_size is 13, more than the parent's 12",
    ]
    assert misfits(dense_config(block_size=11), parent) == []


def test_a_shorter_context_keeps_the_first_positions() -> None:
    parent = GPT(dense_config(), 30)
    parent.init_weights(0)
    child = GPT(dense_config(block_size=5), 30)
    child.load_state_dict(starting_weights(parent.state_dict(), dense_config(block_size=5), seed=0))
    tokens = torch.arange(5)[None]
    assert torch.equal(child(tokens).logits_BTV, parent(tokens).logits_BTV)
