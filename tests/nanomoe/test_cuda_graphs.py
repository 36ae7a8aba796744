"""In which order the device is told what, on a stand-in for torch's interface to it. What a graph does is shown by the
tests that are marked `gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomoe import cuda_graphs
from nanomoe.cuda_graphs import CudaGraphs

GPU = torch.device("cuda", 0)


class Torch:
    """What torch was told, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[Any] = []
        told = self.told

        @contextmanager
        def within(name: Any) -> Iterator[None]:
            told.append(("enter", name))
            try:
                yield
            finally:
                told.append(("exit", name))

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: "Stream") -> None:
                told.append((self.name, "waits for", other.name))

        class Graph:
            n = 0

            def __init__(self) -> None:
                Graph.n += 1
                self.number = Graph.n

            def pool(self) -> tuple[int, int]:
                return (0, self.number)

            def replay(self) -> None:
                told.append("replay")

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking

            def record(self, stream: Stream) -> None:
                told.append("record")

            def synchronize(self) -> None:
                told.append("wait")

        default = Stream("default")

        def graph(graph: Graph, pool: Any, stream: Stream, *, capture_error_mode: str) -> Any:
            assert capture_error_mode == "thread_local"
            return within(("capture", pool, stream.name))

        for name, fake in {
            "device": lambda _: within("device"),
            "current_device": lambda: 0,
            "Stream": lambda: Stream("capturing"),
            "current_stream": lambda _=None: default,
            "stream": lambda stream: within(stream.name),
            "CUDAGraph": Graph,
            "graph": graph,
            "Event": Event,
        }.items():
            patch.setattr(f"torch.cuda.{name}", fake)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    cuda_graphs.capture_stream.cache_clear()
    yield Torch(monkeypatch)
    cuda_graphs.capture_stream.cache_clear()


def test_warm_ups_run_where_the_capture_runs_and_what_they_change_is_put_back(fake: Torch) -> None:
    graphs, x = CudaGraphs(GPU), torch.zeros(2)
    fake.told.clear()

    def work() -> None:
        fake.told.append(("work", x.tolist()))
        x.add_(1)

    graphs.capture(work, [x]).replay()
    assert fake.told == [
        ("enter", "device"),
        ("capturing", "waits for", "default"),
        ("enter", "capturing"),
        ("work", [0, 0]),
        ("work", [1, 1]),
        ("exit", "capturing"),
        ("default", "waits for", "capturing"),
        ("enter", "capturing"),
        ("enter", ("capture", None, "capturing")),
        ("work", [0, 0]),
        ("exit", ("capture", None, "capturing")),
        ("exit", "capturing"),
        ("exit", "device"),
        ("enter", "device"),
        "replay",
        ("exit", "device"),
    ]


def test_what_is_warm_is_only_captured(fake: Torch) -> None:
    graphs, n = CudaGraphs(GPU), [0]

    def work() -> None:
        n[0] += 1

    graphs.capture(work, is_warm=True)
    assert n == [1]


def test_graphs_share_their_memory_until_none_of_them_is_left(fake: Torch) -> None:
    graphs = CudaGraphs(GPU)

    def pool() -> Any:
        return next(what for kind, what in reversed(fake.told) if kind == "enter" and what[0] == "capture")[1]

    first = graphs.capture(lambda: None)
    assert pool() is None
    second = graphs.capture(lambda: None)
    assert pool() == first.graph.pool()  # type: ignore[attr-defined]
    del second  # the newest
    third = graphs.capture(lambda: None)
    assert pool() == first.graph.pool()  # type: ignore[attr-defined]
    del first, third
    graphs.capture(lambda: None)
    assert pool() is None


def test_after_work_that_cannot_be_captured_the_stream_is_the_one_from_before(fake: Torch) -> None:
    def work(x: Tensor = torch.zeros(())) -> None:  # noqa: B008
        x.add_(1)
        if x == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs = CudaGraphs(GPU)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(work)
    assert fake.told[-3:] == [("exit", ("capture", None, "capturing")), ("exit", "capturing"), ("exit", "device")]
    assert graphs.capture(lambda: None)


def test_the_host_is_a_few_steps_ahead_at_most(fake: Torch) -> None:
    graphs = CudaGraphs(GPU)
    fake.told.clear()
    for _ in range(11):
        graphs.limit_lead()
    assert fake.told == 8 * ["record"] + 3 * ["record", "wait"]
