"""Whole steps with kernels, captured on the stand-in, against eager ones: few steps of few tokens, because the
interpreter takes a tenth of a second and more for each token."""

from typing import Any

import pytest
import torch

from nanomoe.training.run import Run
from nanomoe.training.steps import choice
from nanomoe.training.steps.choice import StepPath
from tests.nanomoe.training.steps import runs
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, test_captured_on_a_gpu.py has such steps"),
]

TEXT = "o rato e o rei"
"""Of three windows, the last moved back: batches of two and of one."""

TINY = {"block_size": 5, "batch_size": 2, "n_layer": 1, "n_embd": 16, "lr": 1e-3}
MOE = {"use_moe": True, "n_experts": 4, "n_layer": 2, "capacity_factor": 1.0, "router_noise": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "dropout, accumulated, the last ragged, clipped": {"gradient_accumulation_steps": 2, "grad_clip": 0.5},
    "no dropout, no bias": {"dropout": 0.0, "bias": False},
    "bfloat16": {"precision": "bfloat16"},
    "mixture in bfloat16": MOE | {"precision": "bfloat16"},
    "balanced mixture": MOE | {"router_bias_update_rate": 1e-2, "n_shared_experts": 1},
}


@pytest.fixture(autouse=True)
def short_text_on_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    monkeypatch.setattr(runs, "TEXT", TEXT)


def start(config: dict[str, Any], path: StepPath, resume: dict[str, bytes] | None = None) -> Run:
    run = runs.start(TINY | config, path, resume)
    for moe in run.model.moe_layers.values():
        moe.path = "masked"  # what a CPU prefers cannot be captured
    return run


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_norms_and_weights_are_those_of_eager_steps(config: dict[str, Any]) -> None:
    ours, theirs = start(config, "triton"), start(config, "eager")
    narrow = config.get("precision") == "bfloat16"
    for _ in range(2):
        figures = zip(ours.train_step(), theirs.train_step(), strict=True)
        for mine, reference in figures:
            torch.testing.assert_close(mine, reference, rtol=2e-2 if narrow else 1e-5, atol=0)
    assert ours.warnings == []
    if not narrow:
        torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_from_a_snapshot_with_the_same_bytes() -> None:
    whole, first = start({}, "triton"), start({}, "triton")
    for run in (whole, first):
        run.train_step()
    resumed = start({}, "triton", first.snapshot().files)
    for run in (whole, resumed):
        run.train_step()
    ours, theirs = (run.model.state_dict() | run.step.tensors() for run in (whole, resumed))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
