"""Steps of stacked models against the same jobs' captured steps, on a stand-in for CUDA graphs."""

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.evaluation.evaluate import Measured
from nanomoe.evaluation.together import Evaluated, measure_together
from nanomoe.plan import OutOfMemory
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training import cohort_thread
from nanomoe.training.cohort import Left, Member, stack, train_together
from nanomoe.training.loop import LossNotFinite, Steps, Stopped, Undisturbed, train
from nanomoe.training.run import Recorded, Run, Snapshot, Warned, prepare
from nanomoe.training.steps import choice
from nanomoe.training.steps.choice import StepPath
from nanomoe.training.steps.stacked import Lane, StackedSteps
from nanomoe.training.steps.step import Figures
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs
from tests.nanomoe.training.test_cohort import StopAfter, by_member, figures

TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. " * 4
TINY = {"tokenizer": "bytes", "block_size": 33, "n_layer": 2, "n_head": 2, "n_embd": 16, "batch_size": 4, "lr": 1e-2}
MOE = {"use_moe": True, "n_experts": 4, "moe_stride": 1}
OWN: list[dict[str, Any]] = [
    {},
    {"seed": 7, "lr": 3e-3, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "grad_clip": 0.3},
    {"dropout": 0.0, "warmup_steps": 3, "lr_schedule": "cosine"},
    {"dropout": 0.5, "epochs": 3},
]
"""What members of a cohort differ in."""
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "no bias": {"bias": False},
    "accumulated": {"batch_size": 3, "gradient_accumulation_steps": 3},
    "one window": {"block_size": 400},
    "mixture": MOE | {"capacity_factor": 1.0, "router_noise": True, "n_shared_experts": 1},
    "mixture, one window": MOE | {"block_size": 400, "capacity_factor": 1.0},
    "balanced mixture": MOE | {"router_bias_update_rate": 1e-2, "batch_size": 3, "gradient_accumulation_steps": 2},
}
TEXTS = (TEXT, TEXT[:250], TEXT, TEXT + TEXT[:40])


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)


def start(config: dict[str, Any], path: StepPath = "stacked", text: str = TEXT, **how: Any) -> Run:
    parsed = JobConfig.model_validate(TINY | config)
    prepared = prepare(parsed, text, load_tokenizer("bytes"), path=path, n_threads=1, **how)
    assert prepared.execution.path == path
    return prepared.run


def stacked(configs: list[dict[str, Any]], width: int | None = None, texts: tuple[str, ...] = TEXTS) -> list[Run]:
    runs = [start(config, text=text) for config, text in zip(configs, texts, strict=False)]
    stack(runs, width or len(runs))
    assert all(isinstance(run.step, Lane) for run in runs)
    return runs


def step_all(runs: list[Run]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    figures = [run.train_step() for run in runs]
    for program in {run.step.program for run in runs if isinstance(run.step, Lane)}:
        program.advance()
    return figures


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """But for the keys' biases: attention does not depend on them, so that their gradients are noise."""
    dropped = {f"dropped.{layer}": n for layer, n in run.progress.dropped.items()}
    state = run.model.state_dict() | run.step.tensors() | dropped
    return {name: tensor for name, tensor in state.items() if "c_attn.bias" not in name}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_losses_norms_and_weights_are_those_of_each_job_alone(shape: dict[str, Any]) -> None:
    configs = [shape | own for own in OWN]
    texts = TEXTS if "block_size" not in shape else (TEXT, TEXT[:290], TEXT, TEXT)
    ours = stacked(configs, texts=texts)
    theirs = [start(config, "captured", text) for config, text in zip(configs, texts, strict=True)]
    for _ in range(6):
        for mine, alone in zip(step_all(ours), [run.train_step() for run in theirs], strict=True):
            torch.testing.assert_close(torch.stack(mine), torch.stack(alone), rtol=2e-5, atol=1e-6)
    for mine, alone in zip(map(state_of, ours), map(state_of, theirs), strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-3, atol=2e-4)  # six steps move a weight by up to 6e-2


def cohort(configs: dict[str, dict[str, Any]], width: int, **how: Any) -> dict[str, Member]:
    """Members that one program of this width trains."""
    members = {key: Member(key, start(config, **how), Undisturbed()) for key, config in configs.items()}
    stack([one.run for one in members.values()], width)
    return members


def told(members: dict[str, Member]) -> dict[str, list[object]]:
    """What each member's events say that does not depend on a clock; its weights last."""
    found = by_member(train_together(list(members.values())))
    assert {key: events[-1] for key, events in found.items()} == dict.fromkeys(members, Left(None))
    return {key: figures(events) for key, events in found.items()}


SHORT = {"epochs": 3, "cont_max_new_tokens": 1}
DIFFERENT: dict[str, dict[str, Any]] = {
    "plain": SHORT,
    "clipped": SHORT | OWN[1],
    "longer": SHORT | {"epochs": 5, "dropout": 0.0},
    "early": SHORT | {"epochs": 9, "stop_at_perplexity": 200.0, "eval_interval": 2},
}


@pytest.mark.parametrize("shape", [{}, SHAPES["balanced mixture"]], ids=["dense", "mixture"])
def test_a_members_events_and_bytes_do_not_depend_on_its_company(shape: dict[str, Any]) -> None:
    configs = {key: shape | own for key, own in DIFFERENT.items()}
    together = told(cohort(configs, 4))
    assert {key: len(events) for key, events in together.items()} == dict.fromkeys(configs, 2)
    for key in ("longer", "early"):  # the first drops nothing, the others do
        assert told(cohort({key: configs[key]}, 4))[key] == together[key], key


def test_a_member_that_was_stopped_goes_on_in_a_program_of_the_same_width_with_the_same_bytes() -> None:
    config = SHAPES["balanced mixture"] | SHORT
    (whole,) = told(cohort({"a": config}, 3)).values()
    members = cohort({"a": config, "b": config | {"seed": 9}}, 3)
    members["a"] = replace(members["a"], control=StopAfter(members["a"].run, 4))
    (snapshot,) = (one for one in told(members)["a"][1] if isinstance(one, Snapshot))  # type: ignore[attr-defined]
    (resumed,) = told(cohort({"a": config}, 3, resume=snapshot.files)).values()
    assert resumed[1][-1] == whole[1][-1]  # type: ignore[index]
    assert resumed[0] == whole[0][4:]  # type: ignore[index]


def test_a_stop_in_the_last_checkpoint_is_no_end_and_whoever_resumes_makes_it() -> None:
    config = SHORT | {"max_steps": 5}
    (whole,) = told(cohort({"a": config}, 2)).values()
    members = cohort({"a": config}, 2)
    members["a"] = replace(members["a"], control=StopAfter(members["a"].run, 5, "pause"))
    events = by_member(train_together(list(members.values())))["a"]
    *made, snapshot, stopped, left = [event for event in events if not isinstance(event, Steps)]
    assert [event.percent for event in made if isinstance(event, Recorded)] == [0, 25, 50, 75]
    assert (stopped, left) == (Stopped("pause", 5), Left(None))
    assert isinstance(snapshot, Snapshot)
    (resumed,) = told(cohort({"a": config}, 2, resume=snapshot.files)).values()
    assert resumed == [[], [whole[1][-1]]]  # type: ignore[index]


@pytest.mark.parametrize("shape", [{}, SHAPES["balanced mixture"]], ids=["dense", "mixture"])
def test_copies_of_members_after_one_step_are_one_copy_and_stay_as_they_are(shape: dict[str, Any]) -> None:
    runs = stacked([shape, shape | OWN[1]])
    step_all(runs)
    before = [{name: tensor.clone() for name, tensor in run.model.state_dict().items()} for run in runs]
    copies = [run.copy() for run in runs]
    step_all(runs)
    later = runs[0].copy()
    for each in (*copies, later):
        each.build_model()
    for run, copied, expected in zip(runs, copies, before, strict=True):
        assert copied.model.state_dict().keys() == expected.keys()
        torch.testing.assert_close(dict(copied.model.state_dict()), expected, rtol=0, atol=0)
        assert not torch.equal(run.model.transformer.wte.weight, expected["transformer.wte.weight"])
        assert {layer: moe.path for layer, moe in copied.model.moe_layers.items()} == {
            layer: moe.path for layer, moe in run.model.moe_layers.items()
        }
    memory = [run.model.transformer.wte.weight.untyped_storage().data_ptr() for run in (*copies, later)]
    assert memory[0] == memory[1] != memory[2]
    torch.testing.assert_close(dict(later.model.state_dict()), dict(runs[0].model.state_dict()), rtol=0, atol=0)


def test_members_that_come_to_a_quarter_in_the_same_step_are_evaluated_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []

    def counting(members: Sequence[Evaluated], *others: Any) -> list[Measured]:
        passes.append(len(members))
        return measure_together(members, *others)

    monkeypatch.setattr(cohort_thread, "measure_together", counting)
    short = SHORT | {"max_steps": 4}  # the first step is the first quarter
    told(cohort({"a": short, "b": short | {"seed": 2, "lr": 1e-3}}, 2))
    assert passes == [2] * 5


def test_members_that_are_shorter_do_not_hold_up_the_others_with_their_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = cohort({"short": SHORT, "longer": SHORT | {"epochs": 6}}, 2)
    longer, record = members["longer"].run, Run.record
    went_on = threading.Event()

    def waiting_record(self: Run, percent: int, **others: Any) -> Any:
        if percent == 100 and self.config.epochs == SHORT["epochs"]:
            assert went_on.wait(60), "no step was done beside the last checkpoint"
        return record(self, percent, **others)

    def look(self: StackedSteps) -> None:
        advance(self)
        if longer.progress.step > members["short"].run.plan.total_steps:
            went_on.set()

    advance = StackedSteps.advance
    monkeypatch.setattr(StackedSteps, "advance", look)
    monkeypatch.setattr(Run, "record", waiting_record)
    told(members)


def test_a_loss_that_is_not_finite_ends_its_member_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    members = cohort({"plain": SHORT, "poison": SHORT | {"epochs": 20}}, 2)
    run = members["poison"].run
    train_step = run.train_step

    def step() -> Figures:
        if run.progress.step == 2:
            with torch.no_grad():
                run.model.transformer.ln_f.weight.fill_(math.nan)
        return train_step()

    monkeypatch.setattr(run, "train_step", step)
    found = by_member(train_together(list(members.values())))
    left = found["poison"][-1]
    assert isinstance(left, Left)
    assert isinstance(left.error, LossNotFinite)
    assert figures(found["plain"]) == told(cohort({"plain": SHORT}, 2))["plain"]


def test_memory_that_runs_out_says_how_many_models_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(RecordedGraphs, "capture", capture)
    runs = [start({}), start({"seed": 2})]
    with pytest.raises(OutOfMemory, match="2 models at once"):
        stack(runs, 2)


def test_where_nothing_can_be_captured_each_goes_on_by_itself_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: Any, **__: Any) -> None:
        raise RuntimeError("an operator waits for a number")

    monkeypatch.setattr(RecordedGraphs, "capture", capture)
    members = cohort({"a": SHORT, "b": SHORT | {"seed": 2}}, 2)
    found = by_member(train_together(list(members.values()), n_processes=1))
    for key, own in (("a", {}), ("b", {"seed": 2})):
        warned = [event.code for event in found[key] if isinstance(event, Warned)]
        assert "step_not_captured" in warned
        alone = figures(list(train(start(SHORT | own, "eager"))))
        assert figures(found[key])[0] == alone[0]
