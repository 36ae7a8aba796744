"""How many models one program on a GPU has: measured once, here on a stand-in for CUDA graphs."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nanomoe.config import JobConfig
from nanomoe.training import program_width
from nanomoe.training.steps import choice
from nanomoe.training.steps.loops.compiling import LOOPS
from nanomoe.training.steps.stacked import StackedSteps
from nanomoe.training.steps.stacked_parameters import StackedParameters
from nanomoe.training.steps.step import CaptureFailed
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LOOPS, "folder", tmp_path / "kept")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that the stand-in captures in no time."""
    monkeypatch.setitem(choice.CAPTURING, "cpu", RecordedGraphs)
    monkeypatch.setattr(program_width, "_CONFIG", JobConfig(block_size=8, n_layer=1, n_head=1, n_embd=4))
    monkeypatch.setattr(program_width, "_VOCAB_SIZE", 16)


def test_programs_are_captured_and_timed(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, float]] = []
    seconds = program_width._seconds

    def timed(device: torch.device, width: int) -> float:
        widths.append((width, seconds(device, width)))
        return 1 / width

    monkeypatch.setattr(program_width, "_seconds", timed)
    assert program_width.measure(torch.device("cpu"), most=2) == 2
    assert [width for width, _ in widths] == [1, 2]
    assert all(one > 0 for _, one in widths)


def test_every_step_of_every_model_is_done(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of idle lanes would be faster."""
    programs: list[StackedSteps] = []
    advance = StackedSteps.advance

    def noting(self: StackedSteps) -> None:
        advance(self)
        programs.append(self)

    monkeypatch.setattr(StackedSteps, "advance", noting)
    program_width._seconds(torch.device("cpu"), 2)
    assert len(programs) == program_width._WARM_UPS + program_width._STEPS
    assert programs[-1].is_skipped_W.tolist() == [0, 0]
    assert programs[-1].parameters.tensors(1)["step.transformer.wte.weight"] == len(programs)


def test_nothing_is_measured_where_models_learn_something_else_in_company(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    program_width.check_losses(torch.device("cpu"))
    update = StackedParameters.update

    def with_another_rate(self: StackedParameters, loss_W: torch.Tensor, lr_W: torch.Tensor, *others: Any) -> None:
        update(self, loss_W, lr_W * 1.01, *others)

    monkeypatch.setattr(StackedParameters, "update", with_another_rate)
    with pytest.raises(program_width.LossesDiffer, match="in company"):
        program_width.measure(torch.device("cpu"))


def test_a_width_that_does_not_fit_the_memory_is_too_wide(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(device: torch.device, width: int) -> float:
        if width == 4:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return 1 / width

    monkeypatch.setattr(program_width, "_seconds", seconds)
    assert program_width.measure(torch.device("cpu")) == 2


def test_a_device_that_captures_nothing_is_an_error(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: Any, **__: Any) -> None:
        raise RuntimeError("an operator waits for a number")

    monkeypatch.setattr(RecordedGraphs, "capture", capture)
    with pytest.raises(CaptureFailed):
        program_width.measure(torch.device("cpu"))


def test_it_is_measured_once_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([32, 64])
    monkeypatch.setattr(program_width, "_measure_elsewhere", lambda: next(found))
    assert [program_width.measured_program_width(name) for name in ("H200", "H200", "L4", "H200")] == [32, 32, 64, 32]


def test_what_cannot_be_measured_is_said_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as blind, caplog.at_level(logging.WARNING):
        blind.setenv("CUDA_VISIBLE_DEVICES", "")
        assert program_width.measured_program_width("H200") is None
    assert "cohort_not_measured" in caplog.text
    assert "CUDA" in caplog.text  # what the process said
    monkeypatch.setattr(program_width, "_measure_elsewhere", lambda: 16)
    assert program_width.measured_program_width("H200") == 16


@pytest.mark.gpu
def test_a_gpu_is_measured_in_a_process_of_its_own() -> None:
    before = torch.cuda.memory_allocated()
    width = program_width.measured_program_width(torch.cuda.get_device_name())
    assert width is not None
    assert 1 <= width <= program_width.MOST_MODELS
    assert width & (width - 1) == 0
    assert torch.cuda.memory_allocated() == before
