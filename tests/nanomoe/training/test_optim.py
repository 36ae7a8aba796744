import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from nanomoe.config import JobConfig
from nanomoe.model.gpt import GPT
from nanomoe.training.optim import AdamW, decays, learning_rate

ROOT = Path(__file__).parents[3]


def test_matrices_decay_and_nothing_else_does() -> None:
    model = GPT(JobConfig(use_moe=True, n_shared_experts=1, n_embd=32), vocab_size=50)
    decayed, kept = AdamW(model, JobConfig(weight_decay=0.1)).groups
    assert (decayed.weight_decay, kept.weight_decay) == (0.1, 0.0)
    leaves = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in decayed.parameters}
    assert leaves == {
        *("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"),
        *("router.weight", "experts.w_in", "experts.w_out", "shared.w_in", "shared.w_out"),
    }
    for name in kept.parameters:
        assert name.endswith((".bias", "ln_1.weight", "ln_2.weight", "ln_f.weight", ".b_in", ".b_out"))


CONFIG = JobConfig(
    tokenizer="bytes", use_moe=True, n_layer=2, n_head=2, n_embd=24, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6
)


def built() -> GPT:
    model = GPT.build(CONFIG, 50)
    model.init_weights(0)
    return model


def give_gradients(model: GPT, step: int) -> None:
    """Gradients that are a function of the step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step - 3)


def torch_optimizer(model: GPT) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in named if decays(name, p)], "weight_decay": CONFIG.weight_decay},
            {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        ],
        lr=CONFIG.lr,
        betas=CONFIG.betas,
        eps=CONFIG.eps,
        fused=True,
    )


def test_steps_and_state_have_the_bits_of_torchs_own_class_also_when_resumed() -> None:
    ours, theirs = built(), built()
    our_optimizer, their_optimizer = AdamW(ours, CONFIG), torch_optimizer(theirs)
    for step in range(8):
        lr = learning_rate(CONFIG, step, 8) * (1 + step)
        our_optimizer.lr = lr
        for group in their_optimizer.param_groups:
            group["lr"] = lr
        for model in (ours, theirs):
            give_gradients(model, step)
        our_optimizer.step()
        their_optimizer.step()
        # What an earlier version saved, from torch's class, is what a run of this one goes on from.
        saved = save(
            {
                f"{key}.{name}": value
                for name, p in theirs.named_parameters()
                for key, value in their_optimizer.state[p].items()
            }
        )
        assert save(our_optimizer.tensors()) == saved
        our_optimizer = AdamW(ours, CONFIG)
        our_optimizer.load(load(saved))
        for name, weight in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight), f"{name} after step {step + 1}"


def test_state_that_is_missing_is_refused() -> None:
    optimizer = AdamW(built(), CONFIG)
    saved = optimizer.tensors()
    del saved["exp_avg.transformer.wte.weight"]
    with pytest.raises(KeyError, match=r"exp_avg\.transformer\.wte\.weight"):
        optimizer.load(saved)


WARM_UP = """
import sys
import torch
from nanomoe.training.steps import threads
from worker import trainer

torch.set_num_threads(2)
threads.measured_threads = lambda *_: 1
trainer._warm_up(measures_cohort=False)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules], torch.get_num_threads())
"""


def test_warming_up_loads_no_compiler_of_torchs_and_leaves_the_process_its_threads() -> None:
    """The compiler takes a second of processor time at the start of every trainer; and a cohort has a process for each
    of the trainer's threads, not for each of those that a step of the warm-up had."""
    ran = subprocess.run(
        [sys.executable, "-c", WARM_UP],
        capture_output=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"NANOMOE_STEP_PATH": "fused"},
        text=True,
    )
    assert ran.stdout.strip() == "[] 2"


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
