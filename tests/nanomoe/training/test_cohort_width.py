"""How many runs are trained together: measured once, and kept."""

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


def test_a_machine_is_measured_by_training_on_it() -> None:
    assert cohort_width.measured_cohort_width(2) in (1, 4)
