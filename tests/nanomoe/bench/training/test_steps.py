"""What is printed follows from the turns."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanomoe.bench.training import steps
from nanomoe.bench.training.contender import Contender
from nanomoe.bench.training.shapes import Shape
from tests.nanomoe.bench.training import nanogpt_stand_in

CPU = torch.device("cpu")


def test_figures_of_a_shape_and_its_mixture(tiny: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", _no_compiler)
    checkout = nanogpt_stand_in.write(tmp_path / "nanoGPT")
    dense, mixture = steps.measure(tiny, CPU, turns=1, steps=2, nanogpt=checkout)
    by_name = {one.who: one for one in dense.measured}
    peers = {who for who, one in by_name.items() if one.is_peer}
    assert peers == {"transformers", "nanoGPT"}
    assert "no compiler here" in dense.not_measured["nanoGPT compiled"]
    assert dense.n_steps == mixture.n_steps == 5
    ours = by_name["eager"]
    assert by_name["transformers"].loss == pytest.approx(ours.loss, rel=1e-5)
    assert by_name["nanoGPT"].loss == pytest.approx(ours.loss, rel=1e-5)
    assert ours.times_as_fast_as.keys() == peers
    for peer, ratio in ours.times_as_fast_as.items():
        assert ratio == pytest.approx(by_name[peer].seconds / ours.seconds)
    for one in (*dense.measured, *mixture.measured):
        figures = dense if one in dense.measured else mixture
        peak = figures.limits[one.precision].peak_flops_per_sec
        assert one.tok_per_sec == pytest.approx(24 / one.seconds)
        assert one.mfu == pytest.approx(figures.flops_per_step / one.seconds / peak)
        assert one.over_limit == pytest.approx(one.seconds / figures.limit_seconds[one.precision])
        assert (one.over_dense is None) == (figures is dense)
    twin = {one.who: one for one in mixture.measured}
    assert twin["eager"].over_dense == pytest.approx(twin["eager"].seconds / ours.seconds)
    assert twin["loop over experts"].loss == pytest.approx(twin["eager"].loss, rel=1e-5)
    assert mixture.not_measured.keys() >= {"transformers", "nanoGPT", "nanoGPT compiled"}


def _no_compiler(*_: object) -> None:
    raise RuntimeError("no compiler here\nand more lines")


def test_contenders_take_turns_and_a_ratio_is_that_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks = clock()
    monkeypatch.setattr("nanomoe.bench.training.steps.time.perf_counter", lambda: next(ticks))

    def contender(name: str) -> Contender:
        return Contender(lambda: order.append(name), lambda: 0.0, torch.nn.Identity(), "float32", 1)

    seconds = steps.race({"one": contender("one"), "other": contender("other")}, CPU, 2, 3, lambda _: None)
    assert order == 2 * (3 * ["one"] + 3 * ["other"])
    assert seconds == {"one": [1.0, 3.0], "other": [2.0, 4.0]}
    assert steps._median_ratio(seconds["other"], seconds["one"]) == pytest.approx((2 + 4 / 3) / 2)


def clock() -> Iterator[float]:
    """Begin and end of turns that take 3, 6, 9, ... seconds."""
    now = 0.0
    for turn in range(1, 100):
        yield now
        now += 3 * turn
        yield now


@pytest.mark.gpu
def test_steps_are_measured_on_a_gpu(tiny: Shape) -> None:
    dense, _ = steps.measure(tiny, torch.device("cuda", 0), turns=2, steps=2)
    assert {one.who for one in dense.measured} >= {"eager", "transformers"}
    assert dense.machine == torch.cuda.get_device_name(0)
    assert all(0 < one.mfu < 1 for one in dense.measured)
