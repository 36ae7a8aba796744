"""Stacked steps on a GPU: the curves of captured ones, the same bytes in whatever company, as much memory as before."""

import gc
from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.cohort import Member, stack, train_together
from nanomoe.training.loop import Undisturbed
from nanomoe.training.run import Recorded, Run, prepare
from nanomoe.training.steps.choice import StepPath
from nanomoe.training.steps.stacked import Lane
from tests.nanomoe.training.test_cohort import by_member

pytestmark = pytest.mark.gpu

TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. " * 4
SHAPE = {"tokenizer": "bytes", "block_size": 33, "n_layer": 2, "n_head": 2, "n_embd": 64, "batch_size": 4}
TINY = SHAPE | {"precision": "float32", "cont_max_new_tokens": 4}
MOE = {"use_moe": True, "capacity_factor": 1.0, "router_noise": True, "router_bias_update_rate": 1e-2}
OWN: list[dict[str, Any]] = [
    {},
    {"seed": 7, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "grad_clip": 0.3},
    {"dropout": 0.0, "warmup_steps": 3, "lr_schedule": "cosine"},
    {"dropout": 0.5},
]


def start(config: dict[str, Any], path: StepPath, text: str, width: int | None = None) -> Run:
    parsed = JobConfig.model_validate(TINY | config)
    prepared = prepare(parsed, text, load_tokenizer("bytes"), device="cuda", path=path, width=width)
    assert prepared.execution.path == path
    return prepared.run


def stacked(configs: list[dict[str, Any]], width: int) -> list[Run]:
    texts = [TEXT, TEXT[:250], TEXT, TEXT + TEXT[:40]]
    runs = [start(config, "stacked", text, width) for config, text in zip(configs, texts, strict=False)]
    stack(runs, width)
    assert all(isinstance(run.step, Lane) for run in runs), "nothing fell back"
    return runs


def curves(runs: list[Run], n_steps: int) -> torch.Tensor:
    """Losses (members, steps)."""
    rows = []
    for _ in range(n_steps):
        losses = [run.train_step()[0] for run in runs]
        for program in {run.step.program for run in runs if isinstance(run.step, Lane)}:
            program.advance()
        rows.append(torch.stack(losses))
    return torch.stack(rows, 1).double()


@pytest.mark.parametrize("shape", [{}, MOE, {"batch_size": 3, "gradient_accumulation_steps": 2}])
def test_loss_curves_equal_those_of_each_job_alone(shape: dict[str, Any]) -> None:
    """Over 10 steps at a high rate, and over 100 at a low one: rounding grows with every step."""
    texts = [TEXT, TEXT[:250], TEXT, TEXT + TEXT[:40]]
    for lr, n_steps, tolerance in ((5e-3, 10, 1e-5), (1e-4, 100, 1e-4)):
        configs = [shape | own | {"lr": lr, "epochs": 100} for own in OWN]
        ours = curves(stacked(configs, 4), n_steps)
        pairs = zip(configs, texts, strict=True)
        reference = torch.cat([curves([start(config, "captured", text)], n_steps) for config, text in pairs])
        assert ((ours - reference) / reference).abs().max() < tolerance


def checkpoints(configs: dict[str, dict[str, Any]], width: int) -> dict[str, list[dict[str, bytes]]]:
    runs = stacked(list(configs.values()), width)
    members = [Member(key, run, Undisturbed()) for key, run in zip(configs, runs, strict=True)]
    found = by_member(train_together(members))
    return {key: [one.files for one in events if isinstance(one, Recorded)] for key, events in found.items()}


@pytest.mark.parametrize("shape", [{"deterministic": True}, MOE | {"deterministic": True}], ids=["dense", "mixture"])
def test_a_members_bytes_do_not_depend_on_its_company(shape: dict[str, Any]) -> None:
    configs = {str(n): shape | own | {"epochs": 4 + n} for n, own in enumerate(OWN)}
    together = checkpoints(configs, 4)
    assert all(len(files) == 5 for files in together.values())
    assert checkpoints({"0": configs["0"]}, 4)["0"] == together["0"]


def test_a_program_gives_back_what_it_took() -> None:
    held = []
    for _ in range(6):
        curves(stacked(OWN, 8), 3)
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[1] * 1.01
