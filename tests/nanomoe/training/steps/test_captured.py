"""The captured step against the eager one, on a stand-in for CUDA graphs that does on a CPU what was captured.

Bit for bit: both do the same operators. Rates are rounded to float32, which is what a graph reads.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.model.moe import ExpertPath
from nanomoe.plan import OutOfMemory
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training import optim
from nanomoe.training.execution import Execution
from nanomoe.training.loop import Happened, LossNotFinite, Steps, Stopped, StopReason, Undisturbed, train
from nanomoe.training.run import Recorded, Run, Snapshot
from nanomoe.training.steps import choice
from nanomoe.training.steps.captured import CapturedStep
from nanomoe.training.steps.choice import StepPath
from tests.nanomoe.training.steps.graphs_stand_in import WARM_UPS, Reads, RecordedGraphs

TEXT = "o rato roeu a roupa do rei de roma, e a rainha com raiva resolveu remendar. " * 4
TINY = {"tokenizer": "bytes", "block_size": 33, "n_layer": 2, "n_head": 2, "n_embd": 16, "batch_size": 4, "lr": 1e-2}
MOE = {"use_moe": True, "n_experts": 4, "moe_stride": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "dropout, the last ragged": {},
    "no dropout": {"dropout": 0.0},
    "no bias": {"bias": False},
    "clipped, on a schedule": {"grad_clip": 0.5, "warmup_steps": 3, "lr_schedule": "cosine"},
    "accumulated": {"batch_size": 3, "gradient_accumulation_steps": 3},
    "one window": {"block_size": 400},
    "bfloat16": {"precision": "bfloat16"},
    "mixture": MOE | {"capacity_factor": 1.0, "router_noise": True, "n_shared_experts": 1},
    "balanced mixture": MOE | {"router_bias_update_rate": 1e-2, "batch_size": 3, "gradient_accumulation_steps": 2},
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(*given: Any) -> float:
        return float(np.float32(optim.learning_rate(*given)))

    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    monkeypatch.setattr("nanomoe.training.run.learning_rate", rounded)


def start(
    config: dict[str, Any],
    path: StepPath = "captured",
    resume: dict[str, bytes] | None = None,
    expert_path: ExpertPath = "masked",
) -> Run:
    parsed = JobConfig.model_validate(TINY | config)
    tokenizer = load_tokenizer("bytes")
    execution = Execution.decide(parsed, "cpu", n_tokens=len(TEXT), path=path)
    assert execution.path == path
    execution = execution.model_copy(update={"expert_path": expert_path if parsed.use_moe else None})
    return Run(parsed, tokenizer.encode(TEXT), tokenizer, execution, device=torch.device("cpu"), resume=resume)


def graphs_of(run: Run) -> RecordedGraphs:
    assert isinstance(run.step, CapturedStep)
    assert isinstance(run.step._graphs, RecordedGraphs)
    return run.step._graphs


def state_of(run: Run) -> dict[str, Tensor]:
    dropped = {f"dropped.{layer}": n for layer, n in run.progress.dropped.items()}
    return run.model.state_dict() | run.step.tensors() | dropped  # among them the balance biases


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_norms_and_weights_are_those_of_eager_steps(config: dict[str, Any]) -> None:
    ours, theirs = start(config), start(config, "eager")
    for _ in range(5):
        assert_equal(*(dict(zip(("loss", "norm"), run.train_step(), strict=True)) for run in (ours, theirs)))
    assert ours.warnings == []
    assert_equal(state_of(ours), state_of(theirs))


def test_experts_in_grouped_products_are_captured_too() -> None:
    ours, theirs = (start(MOE, path, expert_path="grouped") for path in ("captured", "eager"))  # type: ignore[arg-type]
    for _ in range(3):
        ours.train_step()
        theirs.train_step()
    assert ours.warnings == []
    assert_equal(state_of(ours), state_of(theirs))


def test_there_is_one_graph_for_each_shape_and_one_update() -> None:
    run = start({"batch_size": 3, "gradient_accumulation_steps": 2})
    shapes = {(3, True), (3, False), (1, False)}  # ten windows an epoch: 3 and 3, then 3 and 1
    for _ in range(9):
        run.train_step()
    assert isinstance(run.step, CapturedStep)
    assert run.step._micro_batches.keys() == shapes
    assert (graphs_of(run).n_captures, graphs_of(run).n_replays) == (4, 9 * 3)
    assert graphs_of(run).n_warm_ups == 3 * WARM_UPS, "the fourth was warm: a micro-batch of its size had been captured"


def test_a_step_reads_nothing_back() -> None:
    run = start(CONFIGS["balanced mixture"])
    for _ in range(2):
        run.train_step()
    with Reads() as reads:
        figures = [run.train_step() for _ in range(5)]
        assert reads.n == 0
        assert len({loss.item() for loss, _ in figures} | {norm.item() for _, norm in figures}) == 10
        assert reads.n == 10


def test_figures_are_read_together_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanomoe.training.loop.REPORT_SECONDS", 1e9)

    def told(path: StepPath) -> list[tuple[list[int], list[float], list[float]]]:
        happened = train(start({"epochs": 4, "cont_max_new_tokens": 1}, path))
        return [(event.step, event.train_loss, event.grad_norm) for event in happened if isinstance(event, Steps)]

    assert told("captured") == told("eager")
    assert [step for step, _, _ in told("captured")] == [[1], [2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]


class StopAt(Undisturbed):
    """Asks for a stop once a step is done."""

    def __init__(self, run: Run, step: int) -> None:
        self.run, self.step = run, step

    def stop(self) -> StopReason | None:
        return "drain" if self.run.progress.step >= self.step else None


def checkpoints(happened: list[Happened]) -> dict[int, dict[str, bytes]]:
    return {event.percent: event.files for event in happened if isinstance(event, Recorded)}


@pytest.mark.parametrize("config", [{}, CONFIGS["balanced mixture"] | {"val_fraction": 0.3, "warmup_steps": 4}])
def test_a_run_ends_as_an_eager_one_byte_for_byte_and_so_does_one_that_was_stopped(config: dict[str, Any]) -> None:
    config = config | {"epochs": 2, "cont_max_new_tokens": 1}
    expected = checkpoints(list(train(start(config, "eager"))))
    assert list(expected) == [0, 25, 50, 75, 100]
    assert checkpoints(list(train(start(config)))) == expected
    first = start(config)
    before = list(train(first, StopAt(first, 2)))
    assert isinstance(before[-1], Stopped)
    snapshot = next(event for event in reversed(before) if isinstance(event, Snapshot))
    after = list(train(start(config, resume=snapshot.files)))
    assert checkpoints(before) | checkpoints(after) == expected


def test_it_ends_early_at_the_same_step_as_an_eager_run() -> None:
    config = {"epochs": 30, "stop_at_perplexity": 150.0, "cont_max_new_tokens": 1}
    ours, theirs = (checkpoints(list(train(start(config, path)))) for path in ("captured", "eager"))  # type: ignore[arg-type]
    assert ours == theirs
    assert b"stopped_early" in ours[100]["metrics.json"]


def test_a_loss_that_is_not_finite_ends_training_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanomoe.training.loop.REPORT_SECONDS", 0.0)
    run = start({"epochs": 50})

    def poisoned_after_step_5() -> None:
        for event in train(run):
            if run.progress.step == 5 and isinstance(event, Steps):
                run.model.transformer.ln_f.weight.data[3] = math.nan

    with pytest.raises(LossNotFinite, match="at step 6 the loss is nan"):
        poisoned_after_step_5()


@pytest.mark.parametrize("large", [1e30, 1e20], ids=["loss", "gradient"])
def test_steps_after_one_that_is_not_finite_change_nothing(large: float) -> None:
    """The host learns of it many steps later. Embeddings of 1e20 give a loss that is finite, and a gradient's norm that
    is not."""
    run = start({"epochs": 50, "dropout": 0.0} | MOE | {"router_bias_update_rate": 1e-2})
    for _ in range(3):
        run.train_step()
    weight = run.model.transformer.wte.weight.data
    usual = weight.clone()
    weight.mul_(large)
    if large == 1e20:
        run.model.transformer.ln_f.weight.data.mul_(1e15)
    kept = {name: tensor.clone() for name, tensor in state_of(run).items()}
    loss, norm = run.train_step()
    assert not (math.isfinite(loss) and math.isfinite(norm))
    assert_equal(state_of(run), kept)
    weight.copy_(usual)  # what comes after may be finite
    run.model.transformer.ln_f.weight.data.fill_(1.0)
    kept = {name: tensor.clone() for name, tensor in state_of(run).items()}
    assert all(math.isfinite(figure) for figure in run.train_step())
    assert_equal(state_of(run), kept)


class SmallMemory:
    """A forward pass that finds no memory for more than so many windows at once."""

    def __init__(self, run: Run, windows: int) -> None:
        self.windows = windows
        self.forward = run.model.forward

    def __call__(self, tokens: Tensor, **options: Any) -> object:
        if len(tokens) > self.windows:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return self.forward(tokens, **options)


def test_a_micro_batch_that_does_not_fit_is_halved() -> None:
    config = {"batch_size": 8}
    whole, tight = start(config), start(config)
    tight.model.forward = SmallMemory(tight, 3)  # type: ignore[method-assign,assignment]
    loss, norm = tight.train_step()
    assert tight.progress.micro_batch == 2
    assert [warned.code for warned in tight.warnings].count("micro_batch_halved") == 2
    torch.testing.assert_close((loss, norm), whole.train_step(), rtol=1e-5, atol=0)
    assert isinstance(tight.step, CapturedStep)
    assert tight.step._micro_batches.keys() == {(2, True), (2, False)}
    tight.model.forward = SmallMemory(tight, 0)  # type: ignore[method-assign,assignment]
    tight.train_step()  # a replay calls no forward pass
    hopeless = start({"batch_size": 1})
    hopeless.model.forward = SmallMemory(hopeless, 0)  # type: ignore[method-assign,assignment]
    with pytest.raises(OutOfMemory):
        hopeless.train_step()


def test_what_cannot_be_captured_is_done_eagerly_and_says_so() -> None:
    """Padded groups of rows have a length that the host reads."""
    ours, theirs = (start(MOE, path, expert_path="padded") for path in ("captured", "eager"))  # type: ignore[arg-type]
    for _ in range(3):
        ours.train_step()
        theirs.train_step()
    assert [warned.code for warned in ours.warnings] == ["step_not_captured"]
    assert "from step 1 on" in ours.warnings[0].message
    assert_equal(state_of(ours), state_of(theirs))


def test_a_snapshot_can_be_gone_on_from_by_the_eager_step_and_back() -> None:
    captured_run, eager_run = start({}), start({}, "eager")
    for run in (captured_run, eager_run):
        run.train_step()
    for path, snapshot in (("eager", captured_run.snapshot()), ("captured", eager_run.snapshot())):
        resumed = start({}, path, resume=snapshot.files)  # type: ignore[arg-type]
        resumed.train_step()
        if path == "captured":
            eager_run.train_step()
            assert_equal(state_of(resumed), state_of(eager_run))
        else:
            captured_run.train_step()
            assert_equal(state_of(resumed), state_of(captured_run))
