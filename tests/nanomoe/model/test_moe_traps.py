"""Mistakes of published mixtures: each property holds for the layer, and is shown to fail for a layer with the mistake.

A faulty variant differs from the product in the mistake alone.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomoe.config import JobConfig, ModelConfig
from nanomoe.data import Windows
from nanomoe.evaluation.evaluate import evaluate
from nanomoe.evaluation.evaluated_text import EvaluatedText
from nanomoe.evaluation.metrics import Position
from nanomoe.model.gpt import GPT, token_losses
from nanomoe.model.moe import Assignments, Experts, MoE, Router, Routing
from nanomoe.tokenizer import load_tokenizer

MakeMoE = Callable[[ModelConfig], MoE]


def moe_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**({"use_moe": True, "n_experts": 4, "k": 2, "n_embd": 8, "n_head": 2} | changes))


def tokens(config: ModelConfig, T: int) -> Tensor:
    return torch.randn(1, T, config.n_embd, generator=torch.Generator().manual_seed(5))


def built(make: MakeMoE, config: ModelConfig) -> MoE:
    """A layer with a router that prefers some experts, and experts that answer."""
    moe = make(config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return moe


def with_router(router: type[Router]) -> MakeMoE:
    def make(config: ModelConfig) -> MoE:
        moe = MoE(config)
        moe.router = router(config)
        return moe

    return make


def fails(check: Callable[[MakeMoE], None], faulty: MakeMoE) -> None:
    with pytest.raises(AssertionError):
        check(faulty)


# Gates


def check_that_the_language_model_loss_teaches_the_router(make: MakeMoE) -> None:
    moe = built(make, moe_config())
    y, _ = moe(tokens(moe.config, 9))
    y.square().sum().backward()
    assert moe.router.weight.grad is not None
    assert moe.router.weight.grad.norm() > 1e-3


class UngatedRouter(Router):
    def forward(self, x_TC: Tensor, noise_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits_TE, probs_TE, chosen_TK, gates_TK = super().forward(x_TC, noise_TE)
        return logits_TE, probs_TE, chosen_TK, gates_TK * 0 + 1


def test_outputs_are_multiplied_by_the_gate() -> None:
    check_that_the_language_model_loss_teaches_the_router(MoE)
    fails(check_that_the_language_model_loss_teaches_the_router, with_router(UngatedRouter))


def test_the_gate_of_a_single_choice_teaches_the_router_unless_it_is_renormalised() -> None:
    def raw(config: ModelConfig) -> MoE:
        return MoE(config.model_copy(update={"k": 1, "norm_topk_prob": False}))

    def renormalised(config: ModelConfig) -> MoE:
        return MoE(config.model_copy(update={"k": 1, "norm_topk_prob": True}))

    check_that_the_language_model_loss_teaches_the_router(raw)
    fails(check_that_the_language_model_loss_teaches_the_router, renormalised)


def check_that_every_choice_answers(make: MakeMoE) -> None:
    moe = built(make, moe_config(n_experts=3, k=3))
    y, _ = moe(tokens(moe.config, 4))
    for expert in range(3):
        y_without, _ = moe(tokens(moe.config, 4), without_expert=expert)
        assert ((y - y_without).norm(dim=-1) > 1e-3).all()


class OverwritingExperts(Experts):
    def forward(self, *arguments: Any) -> Tensor:
        out_TKC = super().forward(*arguments)
        is_last_K = torch.arange(out_TKC.shape[1]) == out_TKC.shape[1] - 1
        return out_TKC * is_last_K[:, None]


def test_a_later_choice_does_not_overwrite_an_earlier_one() -> None:
    def overwriting(config: ModelConfig) -> MoE:
        moe = MoE(config)
        moe.experts = OverwritingExperts(config.n_experts, config.n_embd, config.expert_hidden, bias=config.bias)
        return moe

    check_that_every_choice_answers(MoE)
    fails(check_that_every_choice_answers, overwriting)


# Balance


class WithOtherBalanceLoss(MoE):
    """A layer whose balance loss is computed by `other`."""

    other: Callable[[MoE, Routing], Tensor]

    def forward(self, x_BTC: Tensor, **options: Any) -> tuple[Tensor, Routing]:
        y_BTC, routing = super().forward(x_BTC, **options)
        return y_BTC, replace(routing, aux_loss=self.other(routing))


def with_balance_loss(other: Callable[[MoE, Routing], Tensor]) -> MakeMoE:
    return type("FaultyMoE", (WithOtherBalanceLoss,), {"other": other})


def check_that_the_balance_loss_does_not_depend_on_the_number_of_experts(make: MakeMoE) -> None:
    for n_experts in (2, 4, 8):
        moe = make(moe_config(n_experts=n_experts, k=1))
        with torch.no_grad():
            moe.router.weight.copy_(torch.eye(n_experts, 8))
        balanced = torch.eye(n_experts, 8)[None]
        assert moe(balanced)[1].aux_loss.item() == pytest.approx(1)


def test_the_balance_loss_sums_over_experts_and_does_not_average() -> None:
    check_that_the_balance_loss_does_not_depend_on_the_number_of_experts(MoE)
    mean = with_balance_loss(lambda moe, routing: routing.aux_loss / moe.config.n_experts)
    fails(check_that_the_balance_loss_does_not_depend_on_the_number_of_experts, mean)


def check_that_the_balance_loss_does_not_depend_on_the_number_of_tokens(make: MakeMoE) -> None:
    moe = built(make, moe_config())
    x = tokens(moe.config, 10)
    once, thrice = moe(x)[1].aux_loss, moe(x.repeat(1, 3, 1))[1].aux_loss
    assert thrice.item() == pytest.approx(once.item(), rel=1e-5)


def test_the_balance_loss_takes_shares_and_not_counts() -> None:
    check_that_the_balance_loss_does_not_depend_on_the_number_of_tokens(MoE)
    counts = with_balance_loss(
        lambda moe, routing: moe.config.n_experts * (routing.counts_E.float() @ routing.probs_TE.mean(0))
    )
    fails(check_that_the_balance_loss_does_not_depend_on_the_number_of_tokens, counts)


def check_that_a_single_choice_leaves_the_balance_loss_a_gradient(make: MakeMoE) -> None:
    moe = built(make, moe_config(k=1, norm_topk_prob=False))
    moe(tokens(moe.config, 9))[1].aux_loss.backward()
    assert moe.router.weight.grad is not None
    assert moe.router.weight.grad.norm() > 1e-4


class TopKSoftmaxRouter(Router):
    def forward(self, x_TC: Tensor, noise_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits_TE, _, chosen_TK, _ = super().forward(x_TC, noise_TE)
        gates_TK = logits_TE.gather(-1, chosen_TK).softmax(-1)
        return logits_TE, torch.zeros_like(logits_TE).scatter(-1, chosen_TK, gates_TK), chosen_TK, gates_TK


def test_probabilities_come_from_the_softmax_over_all_experts() -> None:
    check_that_a_single_choice_leaves_the_balance_loss_a_gradient(MoE)
    fails(check_that_a_single_choice_leaves_the_balance_loss_a_gradient, with_router(TopKSoftmaxRouter))

    def of_a_single_raw_gate(router: type[Router]) -> MakeMoE:
        changes = {"k": 1, "norm_topk_prob": False}
        return lambda config: with_router(router)(config.model_copy(update=changes))

    check_that_the_language_model_loss_teaches_the_router(of_a_single_raw_gate(Router))
    fails(check_that_the_language_model_loss_teaches_the_router, of_a_single_raw_gate(TopKSoftmaxRouter))


def check_that_dropping_does_not_hide_a_collapse(make: MakeMoE) -> None:
    moe = make(moe_config(k=1, capacity_factor=1.0))
    torch.nn.init.zeros_(moe.router.weight)
    with torch.no_grad():
        moe.router.weight[2] = 5
        for parameter in moe.experts.parameters():
            parameter.zero_()
    _, routing = moe(torch.ones(1, 12, 8))
    assert routing.dropped == 9
    assert routing.counts_E.tolist() == [0, 0, 12, 0]
    assert routing.aux_loss.item() == pytest.approx(4, rel=1e-3)


def balance_after_dropping(moe: MoE, routing: Routing) -> Tensor:
    admitted_E = routing.counts_E.clamp(max=math.ceil(len(routing.chosen_TK) * moe.config.k / moe.config.n_experts))
    return len(admitted_E) * (admitted_E / routing.chosen_TK.numel() @ routing.probs_TE.mean(0))


def test_balance_is_computed_before_dropping() -> None:
    check_that_dropping_does_not_hide_a_collapse(MoE)
    fails(check_that_dropping_does_not_hide_a_collapse, with_balance_loss(balance_after_dropping))


def check_that_a_pass_leaves_nothing_behind(make: MakeMoE) -> None:
    moe = built(make, moe_config())
    alone = moe(tokens(moe.config, 9))[1].aux_loss.item()
    moe.eval()
    moe(tokens(moe.config, 1))
    moe.train()
    assert moe(tokens(moe.config, 9))[1].aux_loss.item() == alone


def test_losses_are_returned_and_not_collected() -> None:
    collected: list[Tensor] = []

    def collecting(_: MoE, routing: Routing) -> Tensor:
        collected.append(routing.aux_loss)
        return torch.stack(collected).sum()

    check_that_a_pass_leaves_nothing_behind(MoE)
    fails(check_that_a_pass_leaves_nothing_behind, with_balance_loss(collecting))


# Noise and capacity


class AlwaysNoisyRouter(Router):
    def forward(self, x_TC: Tensor, noise_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().forward(x_TC, torch.randn(len(x_TC), len(self.weight)) if noise_TE is None else noise_TE)


def check_that_evaluation_is_free_of_noise(make: MakeMoE) -> None:
    config = moe_config(router_noise=True, n_layer=2, dropout=0.0)
    model = GPT(config, 11).eval()
    model.init_weights(0)
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp = built(make, config).eval()
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits_BTV, model(ids).logits_BTV)


def test_noise_is_off_in_evaluation() -> None:
    check_that_evaluation_is_free_of_noise(MoE)
    fails(check_that_evaluation_is_free_of_noise, with_router(AlwaysNoisyRouter))


class AlwaysLimitedMoE(MoE):
    def forward(self, x_BTC: Tensor, **options: Any) -> tuple[Tensor, Routing]:
        self.train()
        return super().forward(x_BTC, **options)


def check_that_evaluation_drops_nothing(make: MakeMoE) -> None:
    limited = built(make, moe_config(capacity_factor=0.2, k=1)).eval()
    dropless = built(MoE, moe_config(k=1)).eval()
    for T in (1, 20):
        x = tokens(limited.config, T)
        y, routing = limited(x)
        assert torch.equal(y, dropless(x)[0])
        assert routing.dropped == 0


def test_capacity_is_off_in_evaluation_and_generation() -> None:
    check_that_evaluation_drops_nothing(MoE)
    fails(check_that_evaluation_drops_nothing, AlwaysLimitedMoE)


def check_that_one_token_is_always_routed() -> None:
    moe = built(MoE, moe_config(capacity_factor=0.1))
    assert moe(tokens(moe.config, 1))[1].dropped == 0


def test_capacity_never_rounds_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_one_token_is_always_routed()
    monkeypatch.setattr(
        "nanomoe.model.moe.expert_capacity", lambda factor, T, k, n_experts: int(factor * T * k / n_experts)
    )
    with pytest.raises(AssertionError):
        check_that_one_token_is_always_routed()


def check_that_no_token_displaces_an_earlier_one() -> None:
    moe = built(MoE, moe_config(capacity_factor=0.5))
    for seed in range(40):
        x = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(seed))
        other = x.clone()
        other[:, -1] = torch.randn(8, generator=torch.Generator().manual_seed(1000 + seed))
        (y, routing), (y_other, _) = moe(x), moe(other)
        assert routing.dropped > 0
        torch.testing.assert_close(y[:, :-1], y_other[:, :-1])


def ranks_by_score(assignments: Assignments, gates_TK: Tensor) -> Tensor:
    """Each expert admits its highest gates first."""
    return ranks_in_order(assignments, gates_TK.flatten().argsort(descending=True))


def ranks_first_choices_first(assignments: Assignments) -> Tensor:
    """All tokens' first choices before any second one."""
    flat = torch.arange(assignments.chosen_TK.numel()).view_as(assignments.chosen_TK)
    return ranks_in_order(assignments, flat.T.flatten())


def ranks_in_order(assignments: Assignments, order_A: Tensor) -> Tensor:
    chosen_A = assignments.chosen_TK.flatten()
    one_hot_AE = torch.nn.functional.one_hot(chosen_A[order_A], len(assignments.counts_E))
    ranks_A = torch.empty_like(chosen_A)
    ranks_A[order_A] = (one_hot_AE.cumsum(0) * one_hot_AE).sum(1) - 1
    return ranks_A.view_as(assignments.chosen_TK)


def test_capacity_admits_in_token_order_and_not_by_score(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_no_token_displaces_an_earlier_one()
    gates: list[Tensor] = []
    route = Router.forward

    def remember(self: Router, x_TC: Tensor, noise_TE: Tensor | None) -> tuple[Tensor, ...]:
        routed = route(self, x_TC, noise_TE)
        gates[:] = [routed[3].detach()]
        return routed

    monkeypatch.setattr(Router, "forward", remember)
    monkeypatch.setattr(Assignments, "ranks", lambda assignments: ranks_by_score(assignments, gates[0]))
    monkeypatch.setattr("nanomoe.model.moe.choose_expert_path", lambda *_: ("masked", "does not read the ranks"))
    with pytest.raises(AssertionError):
        check_that_no_token_displaces_an_earlier_one()


def test_capacity_admits_in_token_order_and_not_first_choices_first(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_no_token_displaces_an_earlier_one()
    monkeypatch.setattr(Assignments, "ranks", ranks_first_choices_first)
    monkeypatch.setattr("nanomoe.model.moe.choose_expert_path", lambda *_: ("masked", "does not read the ranks"))
    with pytest.raises(AssertionError):
        check_that_no_token_displaces_an_earlier_one()


# What is reported, and where training starts


def check_that_the_perplexity_is_that_of_the_cross_entropy() -> None:
    config = JobConfig(
        use_moe=True, n_layer=2, n_embd=8, n_head=2, block_size=16, router_aux_loss_coef=1.0, cont_max_new_tokens=1
    )
    tokenizer = load_tokenizer("bytes")
    model = GPT.build(config, tokenizer.vocab_size)
    model.init_weights(0)
    ids = tokenizer.encode("a rã arranha")
    windows = Windows(torch.tensor(ids), config.block_size)
    metrics = evaluate(
        model,
        EvaluatedText(windows, len(ids)),
        None,
        tokenizer,
        config,
        position=Position(percent=0, step=0, epoch=0),
        previous_choices={},
        train_loss=None,
        train_dropped={},
    ).metrics
    logits_BTV = model.eval()(torch.tensor([ids[:-1]])).logits_BTV
    cross_entropy = token_losses(logits_BTV, torch.tensor([ids[1:]])).mean().item()
    assert metrics.loss == pytest.approx(cross_entropy, rel=1e-5)
    assert metrics.perplexity == pytest.approx(math.exp(cross_entropy), rel=1e-4)


def test_the_perplexity_holds_no_auxiliary_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_the_perplexity_is_that_of_the_cross_entropy()
    balanced = 1.0
    monkeypatch.setattr("nanomoe.evaluation.evaluate.perplexity", lambda loss: math.exp(loss + balanced))
    with pytest.raises(AssertionError):
        check_that_the_perplexity_is_that_of_the_cross_entropy()


def check_that_experts_start_with_the_residual_scaling() -> None:
    model = GPT.build(moe_config(n_layer=8, n_embd=64, n_shared_experts=2), 50)
    model.init_weights(0)
    for moe in model.moe_layers.values():
        assert moe.shared is not None
        for experts in (moe.experts, moe.shared):
            assert experts.w_in.std().item() == pytest.approx(0.02, rel=0.03)
            assert experts.w_out.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)


def test_experts_start_with_the_residual_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_experts_start_with_the_residual_scaling()
    init_weights = GPT.init_weights

    def overwrite(model: GPT, seed: int) -> None:
        init_weights(model, seed)
        for parameter in model.parameters():
            if parameter.dim() > 2:
                torch.nn.init.normal_(parameter, std=0.02)

    monkeypatch.setattr(GPT, "init_weights", overwrite)
    with pytest.raises(AssertionError):
        check_that_experts_start_with_the_residual_scaling()
