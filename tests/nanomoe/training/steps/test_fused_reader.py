"""The fused forward pass of evaluations against the plain one."""

import threading
from typing import Any

import pytest
import torch

from nanomoe.evaluation.evaluated_text import go_on
from nanomoe.evaluation.reader import PlainReader, Reading
from nanomoe.training.run import Run
from nanomoe.training.steps import fused_reader
from nanomoe.training.steps.fused_reader import FusedReader
from tests.nanomoe.training.steps.runs import start

MIXTURE = {"use_moe": True, "moe_stride": 1, "n_experts": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no bias": {"bias": False},
    "one window": {"block_size": 400},
    "mixture": MIXTURE,
    "shared experts, sigmoid, balance bias": MIXTURE
    | {"n_shared_experts": 2, "router_score": "sigmoid", "router_bias_update_rate": 0.1},
    "noise and capacity, which are off": MIXTURE | {"router_noise": True, "capacity_factor": 0.5, "bias": False},
}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows at a time, of which the last batch has one, and parts of the vocabulary that do not divide it."""
    monkeypatch.setattr(fused_reader, "_TOKENS", 70)
    monkeypatch.setattr(fused_reader, "_TILE", 100)


def trained(config: dict[str, Any]) -> Run:
    run = start(config | {"lr": 1e-2})
    for _ in range(3):
        run.train_step()
    run.model.eval()
    return run


def assert_close(one: Reading, other: Reading) -> None:
    assert (one.windows, one.n_targets, one.predicted) == (other.windows, other.n_targets, other.predicted)
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert one.routing.keys() == other.routing.keys()
    for layer, routing in one.routing.items():
        for name in ("chosen_TK", "probs_E", "entropy", "squared_logsumexp"):
            torch.testing.assert_close(getattr(routing, name), getattr(other.routing[layer], name))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_predictions_and_routing_are_those_of_the_plain_pass(
    config: dict[str, Any], n_threads: int, small_batches: None
) -> None:
    run = trained(config)
    assert isinstance(run.reader, FusedReader)
    chosen = [window for window in range(run.windows.count) if window != 2]
    assert_close(run.reader.read(run.windows, chosen), PlainReader(run.model).read(run.windows, chosen))


@pytest.mark.parametrize("config", [MIXTURE, MIXTURE | {"moe_stride": 2, "n_shared_experts": 1, "bias": False}])
def test_losses_without_an_expert_are_those_of_the_plain_pass(
    config: dict[str, Any], n_threads: int, small_batches: None
) -> None:
    run = trained(config)
    chosen = range(3)
    ours = run.reader.losses_without(run.windows, chosen)
    reference = PlainReader(run.model).losses_without(run.windows, chosen)
    assert ours.keys() == reference.keys()
    for layer, losses in ours.items():
        assert losses == pytest.approx(reference[layer], rel=1e-5)
        assert len(set(losses)) > 1


def test_no_bit_depends_on_the_number_of_threads(small_batches: None) -> None:
    run = trained(MIXTURE)
    before = torch.get_num_threads()
    readings = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        read = run.reader.read(run.windows, range(run.windows.count))
        sums = [routing.probs_E.tolist() for routing in read.routing.values()]
        readings.append((read.losses, read.predicted, sums, run.reader.losses_without(run.windows, range(5))))
        assert torch.get_num_threads() == n_threads
    torch.set_num_threads(before)
    assert readings[0] == readings[1] == readings[2]


def test_a_stop_ends_every_thread_and_leaves_no_batch_in_work(n_threads: int, small_batches: None) -> None:
    run = trained({})
    asked_in = set()

    def stop() -> None:
        asked_in.add(threading.get_ident())
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run.reader.read(run.windows, range(run.windows.count), stop)
    assert asked_in == {threading.get_ident()}
    assert torch.get_num_threads() == n_threads
    run.reader.read(run.windows, [0], go_on)


def test_of_equal_logits_the_lowest_token_is_predicted_and_a_loss_that_is_no_number_is_seen(
    small_batches: None,
) -> None:
    run = trained({})
    with torch.no_grad():
        run.model.transformer.wte.weight.fill_(0.5)
    assert set(run.reader.read(run.windows, [0]).predicted) == {0}
    with torch.no_grad():
        run.model.transformer.wte.weight[3] = float("nan")
    assert all(loss != loss for loss in run.reader.read(run.windows, [0]).losses)
