"""A turn is as many steps of every member, without checkpoints."""

import pytest
import torch

from nanomoe.bench.training import cohort
from nanomoe.bench.training.shapes import Shape
from nanomoe.config import JobConfig
from nanomoe.training.run import Run
from nanomoe.training.steps.choice import CAPTURING
from nanomoe.training.steps.stacked import StackedSteps
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs

TINY = Shape("tiny", JobConfig(tokenizer="bytes", block_size=8, n_layer=2, n_head=2, n_embd=16), 256, 1, 8)


def test_every_member_does_the_steps_of_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Run] = []
    recorded: list[int] = []
    init, record = Run.__init__, Run.record

    def keep(self: Run, *args: object, **options: object) -> None:
        init(self, *args, **options)  # type: ignore[arg-type] # passed on as they came
        made.append(self)

    def note(self: Run, percent: int, **options: object) -> object:
        recorded.append(percent)
        return record(self, percent, **options)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(Run, "__init__", keep)
    monkeypatch.setattr(Run, "record", note)
    before = torch.get_num_threads()
    said: list[str] = []
    figures = cohort.measure(TINY, 3, torch.device("cpu"), turns=2, steps=4, path="eager", said=said.append)
    assert [run.progress.step for run in made] == [cohort._WARM_UP + 2 * (4 + 3 * 4)] * 4
    assert {run.config.seed for run in made[1:]} == {0, 1, 2}
    assert recorded == [0] * 4
    assert torch.get_num_threads() == before
    assert said == ["tiny, 3 together: first steps", "tiny, 3 together: turn 1 of 2", "tiny, 3 together: turn 2 of 2"]
    assert (figures.shape, figures.n_members) == ("tiny", 3)
    assert min(figures.seconds_alone, figures.seconds_together, figures.times_as_fast) > 0


def test_on_a_device_that_captures_a_turn_is_as_many_steps_of_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAPTURING, "cpu", RecordedGraphs)
    advanced: list[int] = []
    advance = StackedSteps.advance

    def noted(self: StackedSteps) -> None:
        advanced.append(self.width)
        advance(self)

    monkeypatch.setattr(StackedSteps, "advance", noted)
    figures = cohort.measure(TINY, 3, torch.device("cpu"), turns=2, steps=2, path="captured")
    assert advanced == [3] * (cohort._WARM_UP + 2 * 2)
    assert min(figures.seconds_alone, figures.seconds_together, figures.times_as_fast) > 0


def test_the_measured_shapes_are_single_windows_and_their_twins() -> None:
    shapes = cohort.shapes(with_mixture=True)
    assert [shape.name for shape in shapes] == [
        f"{name}{twin}" for name in ("reference", "narrow", "narrow-bytes") for twin in ("", "-mixture")
    ]
    assert all((shape.n_windows, shape.length) == (1, 87) for shape in shapes)
    assert [shape.config.use_moe for shape in shapes] == [False, True] * 3
    assert len(cohort.shapes(with_mixture=False)) == 3
