"""Checkpoints and snapshots made of copies while training goes on, as on a GPU: here they are told to on a CPU."""

import threading
from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training import beside as beside_steps
from nanomoe.training.loop import Happened, LossNotFinite, Stopped, train
from nanomoe.training.run import Recorded, Run, Snapshot, prepare
from nanomoe.training.steps import choice
from nanomoe.training.steps.captured import CapturedStep
from nanomoe.training.steps.choice import StepPath
from nanomoe.training.steps.fused import FusedStep
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs
from tests.nanomoe.training.steps.runs import TEXT, TINY, StopAt, checkpoints, start

SHORT = {"epochs": 4, "lr": 1e-2, "cont_max_new_tokens": 4, "val_fraction": 0.2}
MIXTURE = {"use_moe": True, "n_experts": 4, "capacity_factor": 0.7, "router_bias_update_rate": 0.01}
WAIT = 60


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_steps, "BESIDE", {"cpu"})
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    monkeypatch.setattr("nanomoe.training.execution.choose_expert_path", lambda *_: ("masked", "it can be captured"))


class SnapshotEveryStep(StopAt):
    def snapshot_due(self) -> bool:
        return True


@pytest.mark.parametrize("path", ["fused", "captured"])
@pytest.mark.parametrize("config", [{}, MIXTURE], ids=["dense", "mixture"])
def test_what_is_made_beside_the_steps_has_the_bytes_of_what_is_made_between_them(
    config: dict[str, Any], path: StepPath, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    with monkeypatch.context() as inline:
        inline.setattr(beside_steps, "BESIDE", set())
        run = start(SHORT | config, path)
        expected = list(train(run, SnapshotEveryStep(run, 1000)))
    run = start(SHORT | config, path)
    found = list(train(run, SnapshotEveryStep(run, 1000)))
    assert isinstance(run.step, CapturedStep if path == "captured" else FusedStep)
    assert list(checkpoints(found)) == [0, 25, 50, 75, 100]
    assert checkpoints(found) == checkpoints(expected)
    assert without_percent_0(found) == without_percent_0(expected)


def without_percent_0(happened: list[Happened]) -> dict[int, dict[str, bytes]]:
    """The files of each step's snapshot, but what depends on whether percent 0 was already there."""
    return {
        event.step: {name: content for name, content in event.files.items() if "untrained" not in name}
        for event in happened
        if isinstance(event, Snapshot) and event.step > 2
    }


@pytest.mark.parametrize("stopped_after", [1, 2, 4, 5])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(stopped_after: int, beside: None) -> None:
    expected = checkpoints(list(train(start(SHORT | MIXTURE))))
    first = start(SHORT | MIXTURE)
    before = list(train(first, StopAt(first, stopped_after)))
    assert isinstance(before[-1], Stopped)
    snapshot = next(event for event in reversed(before) if isinstance(event, Snapshot))
    after = list(train(start(SHORT | MIXTURE, resume=snapshot.files)))
    assert checkpoints(before) | checkpoints(after) == expected


def test_steps_are_done_while_a_checkpoint_is_made(monkeypatch: pytest.MonkeyPatch, beside: None) -> None:
    run = start(SHORT)
    quarter = min(step for step, percent in run.plan.quarters.items() if percent == 25)
    went_on = threading.Event()
    record, train_step = Run.record, Run.train_step

    def waiting_record(self: Run, percent: int, **others: Any) -> Any:
        if percent == 25:
            assert went_on.wait(WAIT), "no step was done beside the checkpoint"
        return record(self, percent, **others)

    def telling_step(self: Run) -> tuple[torch.Tensor, torch.Tensor]:
        done = train_step(self)
        if self.progress.step > quarter:
            went_on.set()
        return done

    monkeypatch.setattr(Run, "record", waiting_record)
    monkeypatch.setattr(Run, "train_step", telling_step)
    found = checkpoints(list(train(run)))
    assert list(found) == [0, 25, 50, 75, 100]
    monkeypatch.undo()
    assert found == checkpoints(list(train(start(SHORT))))


def test_a_checkpoint_under_way_is_yielded_before_a_loss_that_is_not_finite_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    run = start(SHORT)
    quarter = min(step for step, percent in run.plan.quarters.items() if percent == 25)
    train_step = Run.train_step

    def failing_step(self: Run) -> tuple[torch.Tensor, torch.Tensor]:
        loss, norm = train_step(self)
        return (loss * float("nan") if self.progress.step > quarter else loss), norm

    monkeypatch.setattr(Run, "train_step", failing_step)
    percents: list[int] = []

    def until_the_end() -> None:
        percents.extend(event.percent for event in train(run) if isinstance(event, Recorded))

    with pytest.raises(LossNotFinite):
        until_the_end()
    assert percents == [0, 25]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, MIXTURE], ids=["dense", "mixture"])
def test_on_a_gpu_a_second_stream_reads_the_weights_of_its_step(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = JobConfig.model_validate(TINY | SHORT | config | {"deterministic": True, "epochs": 40})

    def bytes_of_checkpoints(kinds: set[str]) -> dict[int, dict[str, bytes]]:
        monkeypatch.setattr(beside_steps, "BESIDE", kinds)
        run = prepare(whole, TEXT, load_tokenizer("bytes"), device="cuda").run
        return checkpoints(list(train(run, SnapshotEveryStep(run, 10**6))))

    assert bytes_of_checkpoints({"cuda"}) == bytes_of_checkpoints(set())
