"""The stand-in has the traps of CUDA graphs: what it lets pass may be captured, and what it shows is seen on a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.nanomoe.training.steps.graphs_stand_in import WARM_UPS, RecordedGraphs

CPU = torch.device("cpu")


@pytest.fixture
def graphs() -> RecordedGraphs:
    return RecordedGraphs(CPU)


def test_a_capture_does_nothing_and_a_replay_does_it_to_what_is_there_by_then(graphs: RecordedGraphs) -> None:
    x, total = torch.ones(3), torch.zeros(())

    def work() -> None:
        x.add_(1.0)
        total.copy_((x * x).sum())

    program = graphs.capture(work, [x])
    assert x.tolist() == [1, 1, 1]
    x[0] = 4
    program.replay()
    assert (x.tolist(), total.item()) == ([5, 2, 2], 33)


def test_a_number_of_the_host_stays_what_it_was(graphs: RecordedGraphs) -> None:
    """The trap by which a schedule of learning rates silently ends with the capture."""
    x, rate, rate_there = torch.zeros(2), 1.0, torch.ones(())
    program = graphs.capture(lambda: x.copy_(torch.stack([x[0] + rate, x[1] + rate_there])), [x])
    program.replay()
    rate = 10.0
    rate_there.fill_(10.0)
    program.replay()
    assert x.tolist() == [2, 11]


def test_nothing_that_was_allocated_survives_to_the_next_replay(graphs: RecordedGraphs) -> None:
    out = torch.zeros(2)
    kept: list[Tensor] = []

    def work() -> None:
        if len(kept) <= WARM_UPS:  # in the warm-up and the capture
            kept.append(torch.arange(2.0))
        out.copy_(kept[-1] + 1)

    first = graphs.capture(work)
    second = graphs.capture(work)  # reads what only the first computes
    first.replay()
    assert out.tolist() == [1, 2]
    second.replay()
    assert out.tolist() != [1, 2]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.add_(torch.rand(3)),
        lambda x: x.add_(torch.tensor([1.0, 2.0, 3.0])),
        lambda x: x.add_(torch.from_numpy(torch.ones(3).numpy().copy())),
        lambda x: torch._foreach_add_([x], x.sum()),
    ],
)
def test_what_a_gpu_would_refuse_is_refused_and_leaves_no_trace(
    graphs: RecordedGraphs, work: Callable[[Tensor], object]
) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"aten[.:]"):
        graphs.capture(lambda: (x.mul_(2.0), work(x)), [x])
