import math

import pytest

from nanomoe.config import JobConfig
from nanomoe.model.gpt import GPT
from nanomoe.training.optim import build_optimizer, learning_rate


def test_matrices_decay_and_nothing_else_does() -> None:
    model = GPT(JobConfig(use_moe=True, n_shared_experts=1, n_embd=32), vocab_size=50)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = build_optimizer(model, JobConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    leaves = {names[id(p)].rsplit(".", 2)[-2] + "." + names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]}
    assert leaves == {
        *("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"),
        *("router.weight", "experts.w_in", "experts.w_out", "shared.w_in", "shared.w_out"),
    }
    for p in kept["params"]:
        assert names[id(p)].endswith((".bias", "ln_1.weight", "ln_2.weight", "ln_f.weight", ".b_in", ".b_out"))


def test_the_rate_rises_linearly_to_lr_and_then_stays() -> None:
    config = JobConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_cosine_falls_from_lr_to_min_lr_at_the_last_step() -> None:
    config = JobConfig(lr=1.0, min_lr=0.1, warmup_steps=2, lr_schedule="cosine")
    rates = [learning_rate(config, step, 13) for step in range(13)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_cosine_of_one_step_is_lr() -> None:
    assert learning_rate(JobConfig(lr=1.0, lr_schedule="cosine"), 0, 1) == 1.0
