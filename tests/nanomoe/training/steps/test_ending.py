"""Training that ends early where the device decides it, on the stand-in for CUDA graphs: at the step and with the bytes
of a run whose every step waits for its evaluation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanomoe.evaluation.captured import CapturedLoss
from nanomoe.evaluation.evaluate import evaluate_loss
from nanomoe.evaluation.reader import BATCH_BYTES, PlainReader
from nanomoe.training import optim
from nanomoe.training.early_stopping import EndingRule, Losses, ValidationHistory
from nanomoe.training.loop import LossNotFinite, Steps, Stopped, StopReason, Undisturbed, train
from nanomoe.training.run import Run, Snapshot
from nanomoe.training.steps import choice
from nanomoe.training.steps.captured import CapturedStep
from nanomoe.training.steps.choice import StepPath
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.ending import CapturedEnding
from nanomoe.training.steps.step import CaptureFailed
from tests.nanomoe.training.steps import runs
from tests.nanomoe.training.steps.graphs_stand_in import Reads, RecordedGraphs
from tests.nanomoe.training.steps.runs import StopAt, checkpoints

TINY = {"block_size": 17, "n_embd": 16, "n_layer": 1, "lr": 1e-2, "cont_max_new_tokens": 1, "eval_interval": 1}
MOE = {"use_moe": True, "n_experts": 4, "moe_stride": 1, "capacity_factor": 0.5, "router_bias_update_rate": 1e-2}
PERPLEXITY = {"epochs": 6, "stop_at_perplexity": 190.0}
PATIENCE = {
    "epochs": 6, "val_fraction": 0.2, "early_stopping_patience": 3, "early_stopping_min_delta": 100.0,
    "stop_at_perplexity": 1.5,
}  # fmt: skip
"""Only the first evaluation improves by so much."""


RAGGED = 70_000
"""Bytes of the activations of a batch with which the last one is smaller than the others."""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(*given: Any) -> float:
        return float(np.float32(optim.learning_rate(*given)))

    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    monkeypatch.setattr("nanomoe.training.run.learning_rate", rounded)
    for module in ("nanomoe.training.execution", "nanomoe.model.moe"):
        monkeypatch.setattr(f"{module}.choose_expert_path", lambda *_: ("masked", "it can be captured"))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host learns of an end only when it reads figures, and that is late."""
    monkeypatch.setattr(CapturedEnding, "may_have_ended", False)
    monkeypatch.setattr("nanomoe.training.loop.REPORT_SECONDS", 1e9)


def start(config: dict[str, Any], path: StepPath = "captured", resume: dict[str, bytes] | None = None) -> Run:
    return runs.start(TINY | config, path, resume)


@pytest.mark.parametrize("config", [PERPLEXITY, PATIENCE, PERPLEXITY | MOE], ids=["perplexity", "patience", "mixture"])
def test_it_ends_at_the_step_and_with_the_bytes_of_an_eager_run_however_late_the_host_learns_of_it(
    config: dict[str, Any], late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_back = []
    read = Run.read_evaluations

    def watched(run: Run) -> None:
        before = run.progress.step
        read(run)
        taken_back.append(before - run.progress.step)

    monkeypatch.setattr(Run, "read_evaluations", watched)
    happened = list(train(start(config)))
    assert sum(taken_back) > 0, "steps were launched after the end"
    ours, theirs = checkpoints(happened), checkpoints(list(train(start(config, "eager"))))
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert b"stopped_early" in ours[100]["metrics.json"]
    told = [step for event in happened if isinstance(event, Steps) for step in event.step]
    assert told == list(range(1, len(told) + 1))


def test_a_run_that_was_stopped_after_its_end_was_launched_goes_on_to_the_same_bytes(late: None) -> None:
    expected = checkpoints(list(train(start(PATIENCE))))
    for stopped_after in (2, 4, 5):  # it ends after step 4; a checkpoint after step 6 would look at the evaluations
        first = start(PATIENCE)
        before = list(train(first, StopAt(first, stopped_after)))
        assert isinstance(before[-1], Stopped)
        assert before[-1].step == min(4, stopped_after)
        snapshot = next(event for event in reversed(before) if isinstance(event, Snapshot))
        after = list(train(start(PATIENCE, resume=snapshot.files)))
        assert checkpoints(before) | checkpoints(after) == expected


class StopInEvaluation(Undisturbed):
    """Asks for a stop within the evaluation of a checkpoint."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def stop(self) -> StopReason | None:
        return "pause" if self.run.progress.evaluation_is_due else None


def test_a_run_that_was_stopped_within_a_checkpoint_counts_every_evaluation_once(late: None) -> None:
    config = PATIENCE | {"early_stopping_patience": 8}  # after step 9; the first quarter is after step 6
    expected = checkpoints(list(train(start(config))))
    assert b'"best_val_step": 1,' in expected[100]["metrics.json"]
    first = start(config)
    *before, snapshot, stopped = train(first, StopInEvaluation(first))
    assert isinstance(snapshot, Snapshot)
    assert stopped == Stopped("pause", 6)
    assert first.progress.validation.without_improvement == 4, "the evaluation after step 6 will be made anew"
    after = list(train(start(config, resume=snapshot.files)))
    assert checkpoints(before) | checkpoints(after) == expected


def test_the_host_learns_of_an_end_without_waiting_for_it() -> None:
    run = start(PATIENCE | {"epochs": 50})
    for _ in range(4):
        assert not run.may_have_ended
        run.train_step()
        assert run.launch_evaluation()
    assert run.may_have_ended
    run.train_step()
    run.read_evaluations()
    assert (run.progress.step, run.progress.evaluation_is_due) == (4, True)
    assert run.has_reached_its_end()
    assert run.progress.validation.without_improvement == 3


def test_steps_and_the_evaluations_that_may_end_them_read_nothing_back() -> None:
    run = start(PATIENCE | MOE | {"epochs": 50, "early_stopping_patience": 50})
    with Reads() as reads:
        for n in range(6):
            if n == 2:  # everything was captured, with warm-ups
                reads.n = 0
            run.train_step()
            assert run.launch_evaluation()
            assert not run.may_have_ended
        assert reads.n == 0
        run.train_step().loss.item()
        assert reads.n == 1


@pytest.mark.parametrize("batch_bytes", [1, RAGGED, 10**9], ids=["one by one", "the last ragged", "all at once"])
@pytest.mark.parametrize("config", [{}, MOE], ids=["dense", "mixture"])
def test_the_loss_of_a_text_is_that_of_the_plain_reader_bit_for_bit(
    config: dict[str, Any], batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCH_BYTES, "cpu", batch_bytes)
    run, graphs = start(config), RecordedGraphs(torch.device("cpu"))
    reader = PlainReader(run.model)
    captured = CapturedLoss(reader, run.text, graphs)
    for _ in range(3):
        run.train_step()  # the weights are others, and the model is left in the mode of training
        captured.launch()
        assert captured.take().item() == evaluate_loss(reader, run.text)
    left = run.windows.count % reader.windows_per_batch(run.windows)
    assert graphs.n_captures == (2 if batch_bytes == RAGGED else 1)
    assert (left > 0) == (batch_bytes != 1)


def test_the_host_judges_as_the_device_does_to_the_last_bit() -> None:
    most = EndingRule.of(start({"stop_at_perplexity": 190.0}).config).most_loss  # type: ignore[union-attr]
    assert most is not None
    assert math.exp(most) <= 190.0 < math.exp(math.nextafter(most, math.inf))
    rule = EndingRule(most, 2, 0.1)
    losses = [(9.0, 5.0), (9.0, 4.95), (math.nextafter(most, 9), 4.8), (9.0, 4.7), (9.0, math.nan), (most, 4.7)]
    for n in range(len(losses)):
        history, ends = ValidationHistory(), False
        device = device_ending(rule)
        for loss, val_loss in losses[n:]:
            ends, history = rule.judge(Losses(loss, val_loss), 1, history)
            device._loss.total.fill_(loss)  # type: ignore[union-attr]
            device._val_loss.total.fill_(val_loss)  # type: ignore[union-attr]
            device._judge()
            assert device._found.tolist()[2] == ends
            assert device._without_improvement.item() == history.without_improvement
        assert ends, "the last is low enough"


def device_ending(rule: EndingRule) -> CapturedEnding:
    """Of texts that have one target."""
    run = start({"val_fraction": 0.2})
    ending = CapturedEnding(
        rule, PlainReader(run.model), run.text, run.val_text, RecordedGraphs(run.device), torch.zeros(())
    )
    for loss in (ending._loss, ending._val_loss):
        assert loss is not None
        loss._n_targets.fill_(1.0)
    ending.follow(ValidationHistory())
    return ending


def test_a_loss_that_is_not_finite_before_the_end_fails_the_run(late: None) -> None:
    run = start(PATIENCE)

    def poisoned_after_step_1() -> None:
        for event in train(run):
            if isinstance(event, Steps) and event.step[-1] == 1:
                run.model.transformer.ln_f.weight.data[3] = math.nan

    with pytest.raises(LossNotFinite, match="at step 2 the loss is nan"):
        poisoned_after_step_1()


def test_evaluations_that_cannot_be_captured_are_waited_for_and_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = checkpoints(list(train(start(PATIENCE, "eager"))))
    monkeypatch.setattr(PlainReader, "sum_of_losses", lambda *_: torch.ones(()) * torch.ones(()).item())
    run = start(PATIENCE)
    happened = list(train(run))
    assert [event.code for event in happened if hasattr(event, "code")] == ["evaluation_not_captured"]
    assert checkpoints(happened) == expected


def test_steps_that_are_done_eagerly_after_the_end_change_nothing_either(late: None) -> None:
    run = start(PATIENCE | MOE | {"epochs": 50, "router_noise": True})
    for _ in range(4):
        run.train_step()
        run.launch_evaluation()

    def state() -> dict[str, Tensor]:
        dropped = {f"dropped.{layer}": n for layer, n in run.progress.dropped.items()}
        return {name: t.clone() for name, t in (run.model.state_dict() | run.step.tensors() | dropped).items()}

    kept = state()
    run.train_step()
    assert isinstance(run.step, CapturedStep)
    run._go_on_eagerly(CaptureFailed("a shape that was not seen before"))
    assert isinstance(run.step, EagerStep)
    run.train_step()
    assert [name for name, tensor in state().items() if not torch.equal(tensor, kept[name])] == []
    run.read_evaluations()
    assert run.progress.step == 4
