"""A captured step that one job leaves to the next, on the stand-in: the bytes are those of a step captured anew."""

from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.loop import Stopped, train
from nanomoe.training.run import Recorded, Run, prepare
from nanomoe.training.steps import choice
from nanomoe.training.steps.captured import CapturedStep
from nanomoe.training.steps.kept import MOST_KEPT, KeptSteps, shape_of
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs
from tests.nanomoe.training.steps.runs import TEXT, TINY, StopAt

CONFIG = TINY | {"epochs": 2, "cont_max_new_tokens": 1, "n_embd": 16}
MOE = {"use_moe": True, "n_experts": 4, "moe_stride": 1, "router_bias_update_rate": 1e-2, "router_noise": True}
OTHER_TEXT = TEXT.swapcase()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)


def start(config: dict[str, Any], text: str, kept_steps: KeptSteps | None, resume: Any = None) -> Run:
    parsed = JobConfig.model_validate(CONFIG | config)
    given = {"path": "captured", "kept_steps": kept_steps, "resume": resume}
    run = prepare(parsed, text, load_tokenizer("bytes"), **given).run
    for moe in run.model.moe_layers.values():
        moe.path = "masked"  # what a CPU prefers cannot be captured
    return run


def checkpoints(run: Run, step: int | None = None) -> dict[int, dict[str, bytes]]:
    """Those of a job that ends, or is stopped after a step."""
    happened = list(train(run, None if step is None else StopAt(run, step)))
    assert isinstance(happened[-1], Stopped) == (step is not None)
    assert run.warnings == []
    run.keep_step()
    return {event.percent: event.files for event in happened if isinstance(event, Recorded)}


def captures(run: Run) -> int:
    assert isinstance(run.step, CapturedStep)
    assert isinstance(run.step._graphs, RecordedGraphs)
    return run.step._graphs.n_captures


@pytest.mark.parametrize("more", [{}, MOE], ids=["dense", "mixture"])
def test_a_job_ends_with_the_same_bytes_on_a_step_that_another_job_left(more: dict[str, Any]) -> None:
    second = more | {"seed": 7, "lr": 3e-3, "warmup_steps": 2}
    expected = checkpoints(start(second, OTHER_TEXT, None))
    kept_steps = KeptSteps()
    first = start(more, TEXT, kept_steps)
    checkpoints(first, step=4)  # a job that was stopped leaves its step too
    n_captures = captures(first)
    run = start(second, OTHER_TEXT, kept_steps)
    assert run.step is first.step
    assert checkpoints(run) == expected
    assert captures(run) == n_captures, "nothing was captured again"


def test_a_job_goes_on_from_a_snapshot_on_a_kept_step() -> None:
    kept_steps = KeptSteps()
    whole = start({}, TEXT, None)
    for _ in range(2):
        whole.train_step()
    snapshot = whole.snapshot()
    checkpoints(start({"seed": 9}, OTHER_TEXT, kept_steps))
    resumed = start({}, TEXT, kept_steps, snapshot.files)
    assert len(kept_steps) == 0, "it was taken"
    for run in (whole, resumed):
        run.train_step()
    ours, theirs = (run.model.state_dict() | run.step.tensors() for run in (whole, resumed))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_step_that_was_skipped_for_good_is_not_so_for_the_next_job() -> None:
    kept_steps = KeptSteps()
    first = start({}, TEXT, kept_steps)
    first.model.transformer.ln_f.weight.data.fill_(torch.nan)
    first.train_step()
    first.keep_step()
    run = start({}, TEXT, kept_steps)
    before = run.model.transformer.wte.weight.clone()
    assert torch.isfinite(torch.stack(run.train_step())).all()
    assert not torch.equal(run.model.transformer.wte.weight, before)


def test_jobs_whose_graphs_would_differ_share_nothing_and_few_shapes_are_kept() -> None:
    kept_steps = KeptSteps()
    for n_layer in range(1, MOST_KEPT + 2):
        start({"n_layer": n_layer}, TEXT, kept_steps).keep_step()
    assert len(kept_steps) == MOST_KEPT
    for other in ({"n_layer": 1}, {"dropout": 0.1}, {"grad_clip": 1.0}, {"betas": (0.9, 0.99)}, {"batch_size": 3}):
        start(other, TEXT, kept_steps)
    start({}, TEXT + "x", kept_steps)
    assert len(kept_steps) == MOST_KEPT, "none was taken"
    start({"n_layer": MOST_KEPT + 1, "lr": 1.0, "seed": 3, "epochs": 9}, OTHER_TEXT, kept_steps)
    assert len(kept_steps) == MOST_KEPT - 1
    kept_steps.forget()
    assert len(kept_steps) == 0


def test_every_field_of_a_model_and_every_captured_number_is_part_of_a_shape() -> None:
    changed = {"seed": 1, "lr": 0.5, "epochs": 3, "init_from": {"job_id": "some"}, "temperature": 0.3}
    assert shape_of(JobConfig(), n=1) == shape_of(JobConfig.model_validate(changed), n=1)
    assert shape_of(JobConfig(), n=1) != shape_of(JobConfig(), n=2)
    assert shape_of(JobConfig(), n=1) != shape_of(JobConfig(weight_decay=0.5), n=1)
