"""A router that collapses on purpose, and one that is helped out of it, as a user would see them."""

from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.loop import train
from nanomoe.training.run import Recorded, Warned, prepare

TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. "
SMALL = {"tokenizer": "bytes", "n_layer": 2, "n_head": 2, "n_embd": 32, "epochs": 40, "lr": 3e-3}
NO_BALANCE = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


def trained(config: dict[str, Any], *, biased: bool) -> tuple[dict[int, dict[str, Any]], list[Warned]]:
    """{percent: the mixture's mean figures}, and the warnings. `biased`: at first all tokens go to experts 0 and 1."""
    parsed = JobConfig.model_validate(SMALL | {"use_moe": True} | config)
    run = prepare(parsed, TEXT, load_tokenizer("bytes")).run
    if biased:
        with torch.no_grad():
            block = run.model.blocks[1]
            assert block.ln_2.bias is not None
            block.ln_2.bias.fill_(1.0)  # the router has no bias of its own: a constant input serves as one
            block.mlp.router.weight[:2] += torch.tensor([[0.3], [0.28]])  # type: ignore[union-attr,index]
    happened = list(train(run))
    figures = {event.percent: event.metrics.moe.mean for event in happened if isinstance(event, Recorded)}
    return figures, [event for event in happened if isinstance(event, Warned)]


def test_a_router_that_begins_biased_and_is_not_balanced_stays_collapsed_and_says_so() -> None:
    figures, warnings = trained(NO_BALANCE, biased=True)
    for at_quarter in figures.values():
        assert at_quarter.dead_experts == 6
        assert at_quarter.max_violation == pytest.approx(3)
        assert at_quarter.load_entropy == pytest.approx(1 / 3)
    assert [warning.code for warning in warnings] == ["dead_expert"] * 5


def test_the_balance_loss_brings_the_dead_experts_back() -> None:
    figures, _ = trained({"router_aux_loss_coef": 0.1, "epochs": 60}, biased=True)
    assert figures[0].dead_experts == 6
    assert figures[100].dead_experts <= 1
    assert figures[100].load_entropy > 0.8


def test_the_balance_bias_brings_dead_experts_back() -> None:
    figures, _ = trained(NO_BALANCE | {"router_bias_update_rate": 0.01, "epochs": 80}, biased=True)
    assert figures[0].dead_experts == 6
    assert figures[100].dead_experts < 6
    assert figures[100].load_entropy > 0.5


def test_a_router_that_begins_at_random_keeps_all_experts_busy() -> None:
    figures, _ = trained({"lr": 1e-3}, biased=False)
    assert figures[100].dead_experts == 0
    assert figures[100].load_entropy > 0.9
