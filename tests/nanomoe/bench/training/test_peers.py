"""Peers do the same work: from the same weights they arrive at the same loss."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanomoe.bench.training import peers, ways
from nanomoe.bench.training.contender import Contender, NotMeasured
from nanomoe.bench.training.shapes import Shape
from tests.nanomoe.bench.training import nanogpt_stand_in

CPU = torch.device("cpu")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return nanogpt_stand_in.write(tmp_path / "nanoGPT")


def losses(contender: Contender, n_steps: int) -> list[float]:
    seen = [contender.loss()]
    for _ in range(n_steps):
        contender.step()
        seen.append(contender.loss())
    return seen


@pytest.mark.parametrize("name", ["transformers", "nanoGPT"])
def test_a_peer_has_the_same_losses_from_the_same_weights(
    tiny: Shape, checkout: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    built = dict(peers.contenders(tiny, CPU, with_transformers=True, nanogpt_checkout=checkout))
    expected = losses(ways.contender(tiny, "eager", "float32", CPU), 8)
    assert expected[-1] < expected[0] - 0.2, "something was learnt"
    assert losses(built[name](), 8) == pytest.approx(expected, rel=1e-5)
    assert capfd.readouterr().out == "", "the standard output is for the figures"


def test_with_dropout_a_peer_trains_with_it_and_is_evaluated_without(tiny: Shape) -> None:
    dropped = tiny.with_dropout(0.5)
    plain, noisy = peers.transformers(tiny, CPU), peers.transformers(dropped, CPU)
    assert noisy.loss() == pytest.approx(plain.loss(), rel=1e-6)
    assert noisy.loss() == noisy.loss()
    assert losses(noisy, 3)[-1] != pytest.approx(losses(plain, 3)[-1], rel=1e-4)


def test_a_loop_over_experts_learns_what_the_batched_experts_do(tiny: Shape) -> None:
    mixture = tiny.mixture()
    expected = losses(ways.contender(mixture, "eager", "float32", CPU), 5)
    assert losses(ways.loop_over_experts(mixture, CPU), 5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda shape, _: peers.transformers(shape.mixture(), CPU), "no class of transformers"),
        (lambda shape, folder: peers.nanogpt(shape.mixture(), CPU, folder, compiled=False), "nanoGPT has no mixture"),
        (lambda shape, folder: peers.nanogpt(shape, CPU, folder / "none", compiled=False), "holds no model.py"),
        (lambda shape, _: ways.loop_over_experts(shape, CPU), "no mixture of experts"),
        (lambda shape, _: ways.contender(shape, "backwards", "float32", CPU), "no such way"),
    ],
)
def test_what_cannot_be_measured_says_why(
    tiny: Shape, checkout: Path, build: Callable[[Shape, Path], object], said: str
) -> None:
    with pytest.raises(NotMeasured, match=said):
        build(tiny, checkout)


def test_each_way_that_covers_the_shape_is_the_one_asked_for(tiny: Shape) -> None:
    for way in ways.WAYS:
        try:
            _, execution = ways.prepare_run(tiny, way, "float32", CPU)
        except NotMeasured:
            continue
        assert execution.path == way


@pytest.mark.gpu
def test_on_a_gpu_peers_end_with_about_the_same_loss(tiny: Shape) -> None:
    device = torch.device("cuda", 0)
    ours = losses(ways.contender(tiny, "eager", "bfloat16", device), 8)
    assert losses(peers.transformers(tiny, device), 8)[-1] == pytest.approx(ours[-1], rel=0.02)
