"""The trainer's side of its supervision: it receives the supervisor's messages, and does not outlive the supervisor.

Three safeguards detect that the supervisor is gone, each for what the others miss: the parent-death signal (Linux)
comes even while a long C call holds the interpreter's lock; the end of the pipe is seen on every system and kills the
whole process group; the deadline in every keep-alive covers a supervisor that is stopped, before another worker can
claim its job. Imports no torch: it is active before the trainer imports it.
"""

import logging
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import NoReturn

from worker.protocol import Assignment, KeepAlive, Start, Stop, StopReason, Train, parse_to_trainer

log = logging.getLogger(__name__)


def end_group() -> NoReturn:
    """Kill this process and all of its group."""
    if os.getpgrp() == os.getpid():  # not when a trainer is run by hand, in the group of a shell
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class Supervision:
    """Reads the supervisor's messages from stdin, a socket, in a thread: jobs, stop requests and keep-alives."""

    def __init__(self, until: float) -> None:
        """`until`: monotonic time at which this process kills itself if no keep-alive has come."""
        # A copy that no child inherits, and an empty stdin for any other reader.
        self._socket = socket.socket(fileno=os.dup(0))
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted
            os.dup2(nothing.fileno(), 0)
        self._until = until
        self._jobs: SimpleQueue[tuple[list[Start], int] | None] = SimpleQueue()
        self._descriptors: deque[int] = deque()
        """Open files that came with bytes of a message that is not handled yet."""
        self._stops: dict[Assignment, StopReason] = {}
        self.should_exit = False
        """Whether this process should exit once its jobs have ended: someone other than its supervisor asked it to."""
        threading.Thread(target=self._read, name="supervision", daemon=True).start()

    def wait_for_jobs(self) -> tuple[list[Start], int] | None:
        """The next jobs, to be trained together, and the descriptor of the slot's lock, to be closed when nothing of
        them is left; None when this process should exit."""
        return self._jobs.get()

    def stop_of(self, assignment: Assignment) -> StopReason | None:
        """Why a job should end at the next step boundary, or None."""
        return self._stops.get(assignment) or ("drain" if self.should_exit else None)

    def terminated(self) -> None:
        """Handle SIGTERM, which the supervisor never sends: stop every job as for a drain, then exit."""
        self.should_exit = True
        self._jobs.put(None)  # for a trainer that waits

    def _read(self) -> None:
        rest = b""
        try:
            # Read the pipe before the clock: a process that was stopped (SIGSTOP) finds its keep-alives there.
            while select.select([self._socket], [], [], max(0.0, self._until - time.monotonic()))[0]:
                read, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
                self._descriptors += descriptors
                if not read:
                    break
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    self._handle(line)
            log.error("supervisor_lost")
        except BaseException:  # a message that cannot be parsed or handled
            log.exception("supervisor_message_invalid")
        finally:
            end_group()

    def _handle(self, line: bytes) -> None:
        match parse_to_trainer(line):
            case KeepAlive(until=until):
                self._until = until
            case Train(starts=starts):
                self._stops = {}  # those of earlier jobs are over
                self._jobs.put((starts, self._descriptors.popleft()))
            case Stop(assignment=assignment, reason=reason):
                self._stops[assignment] = reason
