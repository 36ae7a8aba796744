"""How the engine leaves the processor to others, a training for instance, while it generates few continuations.

Knows no request and no checkpoint.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

LEAST_SHARE = 1 / 10
"""Share of a core's time that generation takes while it has few continuations and others want the processor. Pauses
hold it down to this share, never below. It is about what Linux leaves a process of nice 10 beside one of nice 0 on the
same core, 110 parts of 1,134. A training beside one continuation keeps 0.83 of its steps at an eighth and 0.92 at a
thirteenth (measured)."""

_INTERVAL_SECONDS = 0.02
"""Time of steps after which it is judged whether others want the processor."""

_UNCONTENDED_SHARE = 0.9
"""Share of that time that this thread gets of a processor at least, where nobody else wants it for long: 0.96 and more
on an idle machine, 0.4 to 0.9 beside a training (measured)."""

_MOST_CREDIT_SECONDS = 0.25
"""Seconds of waiting for the processor, at most, that later steps need not pause for."""


class Pace:
    """Pauses between steps while few continuations are generated and others want the processor.

    A low priority alone leaves a training three quarters of its speed (measured): it waits a little at every of its
    many small steps for a core and for the cache. So when the processor keeps this thread waiting, which shows that
    others want it, most of the time is left to them: of a core, this thread takes `LEAST_SHARE`. Where waiting for the
    processor alone takes longer than that, it does not pause on top.
    """

    def __init__(self) -> None:
        self.pause = 0.0
        """Seconds to wait before the next step."""
        self._wall = self._cpu = 0.0
        self._contended = False
        self._ended = time.perf_counter()
        self._due = 0.0
        """Seconds that must pass until this thread has had no more than its share; below 0 where it has had less."""

    @contextmanager
    def step(self, *, few: bool) -> Iterator[None]:
        """A step of generation, in the block. `few`: whether few continuations are generated."""
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        ended, computed = time.perf_counter(), time.thread_time() - cpu
        taken = ended - wall
        self._due = max(self._due + computed / LEAST_SHARE - (ended - self._ended), -_MOST_CREDIT_SECONDS)
        self._ended = ended
        self._wall += taken
        self._cpu += computed
        if self._wall >= _INTERVAL_SECONDS:
            self._contended = self._cpu < _UNCONTENDED_SHARE * self._wall
            self._wall = self._cpu = 0.0
        if not (self._contended and few):
            self._due = min(self._due, 0.0)  # time that nobody else wanted needs no pause later
        self.pause = max(0.0, self._due)
