"""The memory of a process's descendants, watched while they work. Linux only: it is read from /proc."""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SECONDS = 0.2
"""Time between two looks. Each walks the pages of all processes: 1 to 5 ms of a trainer's time (assumed)."""

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


class PeakMemory:
    """The most that the descendants of a process were seen to have together: the sum of their proportional set sizes
    (PSS), in which a page that n processes share counts with an nth in each. So what a fork shares with its parent
    counts once."""

    def __init__(self) -> None:
        self.n_bytes: int | None = None
        """None where the system does not tell."""

    @contextmanager
    def watching(self, ancestor: int) -> Iterator[None]:
        """Look several times a second until the block ends, and once at its end."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_SECONDS):
                self.look(ancestor)

        thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.look(ancestor)

    def look(self, ancestor: int) -> None:
        """Take down what they have now, if it is the most so far."""
        if sys.platform == "linux":
            self.n_bytes = max(self.n_bytes or 0, sum(map(_pss_bytes, _descendants(ancestor))))


def _descendants(process: int) -> Iterator[int]:
    for child in _children(process):
        yield child
        yield from _descendants(child)


def _children(process: int) -> Iterator[int]:
    """The children of all threads of a process; none once it has ended."""
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            yield from map(int, (task / "children").read_text().split())
    except OSError:  # it, or a thread of it, has just ended
        return


def _pss_bytes(process: int) -> int:
    try:
        found = _PSS.search(Path(f"/proc/{process}/smaps_rollup").read_text())
    except OSError:  # it has just ended
        return 0
    return int(found[1]) * 1024 if found else 0
