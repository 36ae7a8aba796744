"""How many runs are trained together: measured once, and kept."""

import math
from pathlib import Path
from typing import Any

import pytest

from nanomoe.training import cohort_width
from nanomoe.training.steps.loops.compiling import LOOPS


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LOOPS, "folder", tmp_path / "kept")


@pytest.mark.parametrize(
    ("n_cores", "seconds", "width"),
    [
        (1, {}, 1),
        (2, {1: 1.0, 2: 0.6}, 4),
        (2, {1: 1.0, 2: 0.95}, 1),
        (8, {1: 1.0, 2: 0.5, 4: 0.3, 8: 0.29}, 8),
        (6, {1: 1.0, 2: 0.5, 4: 0.3}, 8),
    ],
)
def test_as_many_as_gain_from_company_and_twice_that(
    monkeypatch: pytest.MonkeyPatch, n_cores: int, seconds: dict[int, float], width: int
) -> None:
    monkeypatch.setattr(cohort_width, "_seconds", lambda runs: seconds.get(len(runs), 1.0))
    assert cohort_width.measured_cohort_width(n_cores) == width

    def measured_again(*_: Any) -> float:
        raise AssertionError("it is kept")

    monkeypatch.setattr(cohort_width, "_seconds", measured_again)
    assert cohort_width.measured_cohort_width(n_cores) == width


@pytest.mark.parametrize(
    ("seconds", "most", "n_measured", "number"),
    [
        ({1: 1.0, 2: 0.91}, 128, 2, 1),
        ({1: 1.0, 2: 0.9, 4: 0.6, 8: 0.5, 16: 0.46}, 128, 5, 8),
        ({1: 1.0, 2: 0.5, 4: 0.25, 8: 0.1}, 4, 3, 4),
        ({1: 1.0, 2: 0.5, 4: math.inf}, 128, 3, 2),
        ({1: 1.0}, 1, 1, 1),
    ],
)
def test_a_double_has_to_gain_a_tenth(seconds: dict[int, float], most: int, n_measured: int, number: int) -> None:
    measured: list[int] = []

    def measure(n: int) -> float:
        measured.append(n)
        return seconds[n]

    assert cohort_width.number_that_pays(measure, most) == number
    assert measured == list(seconds)[:n_measured]


def test_no_larger_number_is_measured_once_time_is_up() -> None:
    ends = iter([True, True, False])
    assert cohort_width.number_that_pays(lambda n: 1 / n, 128, may_go_on=lambda: next(ends)) == 4


def test_a_machine_is_measured_by_training_on_it() -> None:
    assert cohort_width.measured_cohort_width(2) in (1, 4)
