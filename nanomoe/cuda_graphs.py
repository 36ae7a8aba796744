"""Work on a GPU as captured CUDA graphs: one launch in place of a hundred.

A graph computes again what was captured, at the same addresses and shapes and with the same numbers wherever a number
came from the host: what shall change from one replay to the next lies in tensors that stay. What it allocates is its
pool's, and holds nothing from one replay to the next.

Knows no model: what is captured is a function without arguments.
"""

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_WARM_UPS = 2
"""Runs before the capture, in which libraries choose their kernels and get their workspaces."""

_MOST_UNDER_WAY = 8
"""Steps that the host may be ahead of the device: enough that the device never waits, and few enough that a stop does
not wait long for what was begun before it."""

_ONE_CAPTURE_AT_A_TIME = threading.Lock()


class Program(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Do the work on what its tensors hold by now. It may only have begun when this returns."""


class Graphs(Protocol):
    """What captures the work of one device."""

    def capture(self, work: Callable[[], None], unchanged: Sequence[Tensor] = (), *, is_warm: bool = False) -> Program:
        """Capture what `work` does on the device, without doing it.

        Args:
            work: is called several times, all but the last of them to warm up; then it really does what it does.
            unchanged: tensors that hold afterwards what they held before, whatever the warm-ups wrote to them.
            is_warm: whether the kernels of `work` have run before, so that it needs no warm-up. What a warm-up
                allocates comes on top of the memory of all that was captured before.

        Raises:
            RuntimeError: memory ran out, or `work` does something that cannot be captured.
        """

    def limit_lead(self) -> None:
        """To be called after each step: wait until the device is not far behind the host."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    device: torch.device

    def replay(self) -> None:
        """Replay on the current stream of the graph's own device."""
        with torch.cuda.device(self.device):
            self.graph.replay()


@functools.cache
def capture_stream(device_index: int) -> torch.cuda.Stream:
    """The stream on which this process captures on a device. There is one, because cuBLAS keeps a workspace of 32 MiB
    for each stream that it has ever run on, and never frees it."""
    with torch.cuda.device(device_index):
        return torch.cuda.Stream()


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which this process does what is done beside the steps on a device: one, as for captures."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Captures the work of a GPU. All graphs of one object share their memory, so no two may run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = capture_stream(torch.cuda.current_device())
        self._graphs = weakref.WeakSet[torch.cuda.CUDAGraph]()
        self._under_way: deque[torch.cuda.Event] = deque()

    def capture(self, work: Callable[[], None], unchanged: Sequence[Tensor] = (), *, is_warm: bool = False) -> Program:
        """Capture what `work` does, see `Graphs`."""
        with torch.cuda.device(self._device), _ONE_CAPTURE_AT_A_TIME:
            if not is_warm:
                self._warm_up(work, unchanged)
            earlier, graph = next(iter(self._graphs), None), torch.cuda.CUDAGraph()
            pool = None if earlier is None else earlier.pool()  # a pool ends with the last graph that has it
            # The outer context puts the stream back even where the end of a failed capture raises. Only what this
            # thread does is captured: others load checkpoints or evaluate meanwhile.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"),
            ):
                work()
            self._graphs.add(graph)
        return _Captured(graph, self._device)

    def _warm_up(self, work: Callable[[], None], unchanged: Sequence[Tensor]) -> None:
        before = [tensor.clone() for tensor in unchanged]
        # On the stream of the capture, so that cuBLAS has its workspace for that stream before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        for tensor, kept in zip(unchanged, before, strict=True):
            tensor.copy_(kept)

    def limit_lead(self) -> None:
        """Wait for the step before the last few, see `Graphs`."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append(event)
        if len(self._under_way) > _MOST_UNDER_WAY:
            self._under_way.popleft().synchronize()
