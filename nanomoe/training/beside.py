"""What is made beside the steps: checkpoints and snapshots of a copy of the run, in a thread, while training goes on.

Knows no loop: whoever trains begins it and collects what was made.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from nanomoe.cuda_graphs import side_stream
from nanomoe.evaluation.evaluate import Measured
from nanomoe.evaluation.evaluated_text import RaiseIfStopped
from nanomoe.training.run import Recorded, Run, Snapshot, Warned

Made = Recorded | Snapshot | Warned
Make = Callable[[RaiseIfStopped], Sequence[Made]]

STOP_SECONDS = 0.05
"""Time between two looks for a stop while what is made beside the steps is waited for."""

BESIDE = {"cuda"}
"""Kinds of devices on which checkpoints and snapshots are made beside the next steps: the others compute them with what
they train with, and so would gain nothing."""


class Waits:
    """Nothing more happens to a run before what it has begun in a shared thread is made."""


WAITS = Waits()


@dataclass(frozen=True)
class Recording:
    """A checkpoint to be made of a run that nobody else uses: a copy of the one that goes on."""

    run: Run
    percent: int
    stopped_early: bool
    tok_per_sec: float | None

    def __call__(self, raise_if_stopped: RaiseIfStopped, measured: Measured | None = None) -> Sequence[Made]:
        """Make it; arguments as of `Run.record`."""
        self.run.build_model()
        recorded, warnings = self.run.record(
            self.percent,
            stopped_early=self.stopped_early,
            tok_per_sec=self.tok_per_sec,
            measured=measured,
            raise_if_stopped=raise_if_stopped,
        )
        return [recorded, *warnings]


class SharedThread(Protocol):
    """A thread that several runs have together."""

    def begin(self, make: Make, raise_if_abandoned: RaiseIfStopped, after: "Launched") -> Future[Sequence[Made]]:
        """Make it soon, after what was launched on the device."""


class Launched:
    """All that was launched on a device up to now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Do what comes in this thread, on one core and on a GPU in the stream beside the steps, after it."""
        # One thread, whatever the steps have, leaves them the other cores (assumed to be better; measured only on a
        # machine with other work).
        torch.set_num_threads(1)
        if self._event is None:
            yield
            return
        stream = side_stream(self._device)
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            yield


class Beside:
    """What is made of a copy of the run while training goes on: one thing at a time, in a thread, and on a GPU in a
    stream of its own, after all that was launched before."""

    def __init__(self, device: torch.device, *, has_thread: bool = True, shared: SharedThread | None = None) -> None:
        """Without a thread, a thing is made by whoever collects it. `shared`: a thread that others have too, in place
        of one of its own."""
        self._device = device
        self._has_thread = has_thread
        self._shared = shared
        self._make: Make | None = None
        self._future: Future[Sequence[Made]] | None = None
        self._take_over: Callable[[], None] = lambda: None
        self._abandoned = threading.Event()

    @property
    def may_begin(self) -> bool:
        """Whether this device makes anything beside its steps but the first checkpoint."""
        return self.is_shared or self._device.type in BESIDE

    @property
    def is_shared(self) -> bool:
        """Whether the thread has other runs' things to make too."""
        return self._shared is not None

    @property
    def ready(self) -> bool:
        """Whether `collect` would not wait."""
        return self._future is not None and self._future.done()

    @property
    def waits_for_its_turn(self) -> bool:
        """Whether `collect` would make what was begun."""
        return self._make is not None

    def begin(self, make: Make, take_over: Callable[[], None] = lambda: None) -> None:
        """Start to make it; what was made before has been collected. `take_over` is called in the loop's thread once it
        is there."""
        assert self._future is None, "one thing at a time"
        self._take_over = take_over
        if not self._has_thread:
            self._make = make
            return
        before = Launched(self._device)
        if self._shared is not None:
            self._future = self._shared.begin(make, self._raise_if_abandoned, before)
            return

        def work() -> Sequence[Made]:
            with before.followed():
                return make(self._raise_if_abandoned)

        pool = ThreadPoolExecutor(1)
        self._future = pool.submit(work)
        pool.shutdown(wait=False)

    def collect(self, raise_if_stopped: RaiseIfStopped) -> Iterator[Made | Waits]:
        """Yield what was begun, once, and wait for it, or make it, if need be. In a shared thread it is waited for by
        whoever advances this: `WAITS` is yielded until it is made."""
        if self._make is not None:
            happened = self._make(raise_if_stopped)
            self._make = None
            self._take_over()
            yield from happened
        elif self._future is not None:
            if self._shared is None:
                while wait_for([self._future], STOP_SECONDS).not_done:
                    raise_if_stopped()
            else:
                while not self._future.done():
                    raise_if_stopped()
                    yield WAITS
            happened = self._future.result()
            self._future = None
            self._take_over()
            yield from happened

    def abandon(self) -> None:
        """Let the thread end before its next batch: nobody will collect what it makes."""
        self._abandoned.set()
        self._future = None

    def _raise_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise CancelledError


class FirstCheckpoint:
    """Percent 0, evaluated on a copy of the model: it does not stand in the way of the first steps."""

    def __init__(self, run: Run, *, has_thread: bool, shared: SharedThread | None = None) -> None:
        """Arguments as of `Beside`."""
        self._run = run
        self.untrained = run.untrained_copy()
        """The copy, until the checkpoint is yielded."""
        self._beside = Beside(run.device, has_thread=has_thread, shared=shared)
        self._has_begun = False

    def begin(self) -> None:
        """Start the evaluation, unless that was done: after the first step, so that this one has the machine for
        itself."""
        if (untrained := self.untrained) is not None and not self._has_begun:
            self._has_begun = True
            self._beside.begin(Recording(untrained, 0, stopped_early=False, tok_per_sec=None), self._take_over)

    @property
    def ready(self) -> bool:
        """Whether `collect` would not wait."""
        return self._beside.ready

    @property
    def waits_for_its_turn(self) -> bool:
        """Whether `collect` would make what was begun."""
        return self._beside.waits_for_its_turn

    def abandon(self) -> None:
        """Let the thread end before its next batch: nobody will collect the checkpoint."""
        self._beside.abandon()

    def collect(self, raise_if_stopped: RaiseIfStopped) -> Iterator[Made | Waits]:
        """Yield the checkpoint, once, as `Beside.collect` does; its choices are what the next one's churn is measured
        against."""
        self.begin()
        yield from self._beside.collect(raise_if_stopped)

    def _take_over(self) -> None:
        assert self.untrained is not None, "it is kept until the checkpoint is there"
        self._run.progress.choices = self.untrained.progress.choices
        self.untrained = None
