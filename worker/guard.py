"""A trainer's tie to its supervisor: it obeys it, and does not outlive it.

Three ways to notice that the supervisor has ended, each for what the others miss: the parent-death signal of Linux
(`nanomoe.processes`) comes even while a long C call holds the interpreter's lock; the end of the pipe is seen on every
system and takes the whole process group; the deadline in every beat covers a supervisor that is stopped, before anybody
else can claim its job.
Imports no torch: it is at work before the trainer does.
"""

import logging
import os
import select
import signal
import threading
import time
from queue import SimpleQueue
from typing import NoReturn

from worker.protocol import Beat, Start, Stop, StopReason, parse_to_trainer

log = logging.getLogger(__name__)


def end_group() -> NoReturn:
    """Kill this process and all of its group."""
    if os.getpgrp() == os.getpid():  # not when somebody runs a trainer by hand, in the group of his shell
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class Supervision:
    """Reads stdin in a thread: the start, wishes to stop, and beats."""

    def __init__(self, until: float) -> None:
        """`until`: monotonic time at which this process ends itself if it has heard nothing."""
        # A copy that no child inherits, and an empty stdin for whatever else reads it.
        self._pipe = os.dup(0)
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted
            os.dup2(nothing.fileno(), 0)
        self._until = until
        self._starts: SimpleQueue[Start] = SimpleQueue()
        self.stop: StopReason | None = None
        """Why training should end at the next step boundary."""
        threading.Thread(target=self._listen, name="supervision", daemon=True).start()

    def wait_for_start(self) -> Start:
        """The job of this process."""
        return self._starts.get()

    def terminated(self) -> None:
        """SIGTERM has come. Without a message, somebody other than the supervisor wants this process to end."""
        self.stop = self.stop or "drain"

    def _listen(self) -> None:
        heard = b""
        try:
            # Look into the pipe before at the clock: a process that was stopped finds its beats waiting.
            while select.select([self._pipe], [], [], max(0.0, self._until - time.monotonic()))[0]:
                read = os.read(self._pipe, 1 << 16)
                if not read:
                    break
                *lines, heard = (heard + read).split(b"\n")
                for line in lines:
                    self._obey(line)
            log.error("supervisor_lost")
        except BaseException:  # what the supervisor said cannot be obeyed, or not even be read
            log.exception("supervisor_message_invalid")
        finally:
            end_group()

    def _obey(self, line: bytes) -> None:
        match parse_to_trainer(line):
            case Beat(until=until):
                self._until = until
            case Start() as start:
                self._starts.put(start)
            case Stop(reason=reason):
                self.stop = reason
