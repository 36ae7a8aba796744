"""How much of a processor few texts take, by a clock that the test moves."""

import pytest

from service.generation.pacing import LEAST_SHARE, Pace


def test_few_texts_pause_where_others_want_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr("service.generation.pacing.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("service.generation.pacing.time.thread_time", lambda: clock["cpu"])
    pace = Pace()

    def step(wall: float, cpu: float, *, few: bool = True) -> float:
        with pace.step(few=few):
            clock["wall"] += wall
            clock["cpu"] += cpu
        return pace.pause

    assert step(0.03, 0.03) == 0
    assert step(0.03, 0.02) == pytest.approx(0.02 / LEAST_SHARE - 0.03)
    clock["wall"] += pace.pause
    assert step(0.001, 0.001) > 0.005, "one quick step is no proof that the others have gone"
    assert step(0.03, 0.01, few=False) == 0
    assert step(0.03, 0.03) == 0


@pytest.mark.parametrize("granted", [0.05, LEAST_SHARE, 0.5, 0.8])
def test_pauses_leave_a_text_its_share_of_a_core_or_all_that_the_system_grants(
    monkeypatch: pytest.MonkeyPatch, granted: float
) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr("service.generation.pacing.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("service.generation.pacing.time.thread_time", lambda: clock["cpu"])
    pace = Pace()
    for _ in range(1000):
        with pace.step(few=True):
            clock["wall"] += 0.001 / granted
            clock["cpu"] += 0.001
        clock["wall"] += pace.pause
    assert clock["cpu"] / clock["wall"] == pytest.approx(min(granted, LEAST_SHARE), rel=0.1)


def test_a_long_wait_for_the_processor_shortens_the_pauses_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr("service.generation.pacing.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("service.generation.pacing.time.thread_time", lambda: clock["cpu"])
    pace = Pace()
    for n in range(3000):
        with pace.step(few=True):
            clock["wall"] += 0.1 if n % 10 == 0 else 0.001
            clock["cpu"] += 0.001
        clock["wall"] += pace.pause
    assert clock["cpu"] / clock["wall"] == pytest.approx(10 * 0.001 / (0.1 + 9 * 0.001), rel=0.1)
