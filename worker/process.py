"""A trainer process: started before there is a job, sent messages over pipes, killed with its process group, and
reaped.

Knows no database. A trainer must be started from the main thread: the parent-death signal that it sets
fires when the thread that spawned it ends.
"""

import math
import os
import select
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog

from worker.lock import SlotLock
from worker.protocol import (
    Assignment,
    FromTrainer,
    Idle,
    KeepAlive,
    Ready,
    Start,
    ToTrainer,
    Train,
    encode,
    parse_from_trainer,
)
from worker.survivors import TOKEN_VARIABLE, survivors

log = structlog.get_logger(__name__)

_CHECK_SECONDS = 0.25
"""Longest wait for a message before the process is checked: a grandchild may keep the pipe open after its end."""

_SEND_SECONDS = 5.0
"""Longest wait for a trainer to read its jobs, which may be more than its socket holds. One without a job reads at
once."""


@dataclass(frozen=True)
class Ended:
    """The trainer has ended, or has violated the protocol. No message follows."""

    protocol_error: bool = False
    """Whether the trainer wrote a line that is no message."""

    timed_out: bool = False
    """Whether the time had passed at which a trainer without a keep-alive kills itself."""


@dataclass(frozen=True)
class WakeUp:
    """A change in the database, or a request that the worker drains: no message of the trainer's."""


@dataclass(frozen=True)
class Received:
    """A message of the trainer's."""

    message: FromTrainer
    assignment: Assignment | None
    """The attempt that it is about, one of those that the trainer was given; None where it is about none."""


Inbox = SimpleQueue[Received | Ended | WakeUp]
"""Messages of a trainer, its end, and what other threads have to say."""


class TrainerProcess:
    """A trainer in a session and process group of its own, which holds the lock of its slot while it has a job."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, until: float = math.inf) -> None:
        """`until`: monotonic time at which the trainer kills itself, as `command` tells it, unless a keep-alive names a
        later one. Raises OSError when the system has no process, memory or descriptor left."""
        assert threading.current_thread() is threading.main_thread(), "the parent-death signal follows the thread"
        self.inbox: Inbox = SimpleQueue()
        self._assignments: frozenset[Assignment] = frozenset()
        """The attempts that it was given last."""
        self._until = until
        self.token = uuid.uuid4().hex
        """In the environment of the trainer and of all that it starts."""
        # Its stdin is a socket, because only a socket can send the open file of a lock.
        self._socket, its_stdin = socket.socketpair()
        try:
            with its_stdin:
                self._popen = subprocess.Popen(  # noqa: S603 - our own command
                    command,
                    stdin=its_stdin.fileno(),
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                    env={**environment, TOKEN_VARIABLE: self.token},
                )
        except OSError:
            self._socket.close()  # the start is retried every second, with a descriptor each time
            raise
        self.pid = self._popen.pid
        # A keep-alive must never block the supervisor's main thread on a trainer that has stopped reading.
        self._socket.setblocking(False)
        self._mutex = threading.Lock()
        """Held while the trainer is sent to, signalled or reaped: its process id and socket must still be its own."""
        self._killed = False
        self._gone = False
        threading.Thread(target=self._read, name=f"read-{self.pid}", daemon=True).start()

    def next_message(self, timeout: float = 0.0) -> Received | Ended | WakeUp | None:
        """The next item of the inbox, or None when none came within `timeout` seconds."""
        try:
            return self.inbox.get(timeout=timeout) if timeout > 0 else self.inbox.get_nowait()
        except Empty:
            return None

    # -- Messages ------------------------------------------------------------------------------------------------

    def train(self, starts: Sequence[Start], lock: SlotLock) -> None:
        """Give the trainer jobs, and the slot's lock with them, of which no copy stays in this process."""
        self._assignments = frozenset(start.assignment for start in starts)
        self.send(Train(starts=list(starts)), lock.descriptor)
        lock.close()

    def send(self, message: ToTrainer, *descriptors: int) -> None:
        """Send a message, and open files with it. One to a trainer that has ended or does not read is dropped: `Ended`
        or a deadline follows."""
        rest = encode(message)
        wait_seconds = _SEND_SECONDS if isinstance(message, Train) else 0.0
        with self._mutex:
            if self._gone:
                return
            try:
                rest = rest[socket.send_fds(self._socket, [rest], descriptors) :]
                while rest:
                    if wait_seconds:
                        select.select([], [self._socket], [], wait_seconds)
                    rest = rest[self._socket.send(rest) :]
                if isinstance(message, KeepAlive):
                    self._until = message.until
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                log.debug("message_not_sent", trainer=self.pid, message=message.type)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as stdout:
            protocol_error = not self._read_lines(stdout.fileno())
            self.inbox.put(Ended(protocol_error, timed_out=time.monotonic() >= self._until))

    def _read_lines(self, pipe: int) -> bool:
        """Read messages until the trainer has ended; False when a line is no message."""
        buffered = b""
        while True:
            if not select.select([pipe], [], [], _CHECK_SECONDS)[0]:
                if self.has_ended():
                    return True
                continue
            read = os.read(pipe, 1 << 16)
            if not read:
                return True
            *lines, buffered = (buffered + read).split(b"\n")
            for line in lines:
                try:
                    self.inbox.put(self._received(line))
                except ValueError as error:
                    log.error("trainer_protocol_error", trainer=self.pid, line=line[:200], error=str(error))
                    return False

    def _received(self, line: bytes) -> Received:
        """Raises ValueError when the line is no message, or is about no job that the trainer was given."""
        found = parse_from_trainer(line)
        is_about_none = isinstance(found.message, (Ready, Idle))
        if is_about_none != (found.assignment is None) or not (is_about_none or found.assignment in self._assignments):
            raise ValueError(f"a message about {found.assignment} from a trainer that has {list(self._assignments)}")
        return Received(found.message, found.assignment)

    # -- Ending --------------------------------------------------------------------------------------------------

    def has_ended(self) -> bool:
        """Whether the trainer itself has ended. It is not reaped where the system can tell without, so that its id is
        not given to another process yet."""
        with self._mutex:
            return self._has_ended()

    def _has_ended(self) -> bool:
        if self._popen.returncode is not None:
            return True
        if not hasattr(os, "waitid"):  # macOS before Python 3.13; the group's id stays ours while the group lives
            return self._popen.poll() is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    @property
    def exit_status(self) -> int:
        """After `kill_and_reap`: the exit status, or minus the signal that ended it."""
        assert self._popen.returncode is not None
        return self._popen.returncode

    def wake(self) -> None:
        """SIGUSR1 to the trainer: wake it from a system call, so that it sees the message that was sent."""
        with self._mutex:
            if not self._has_ended():
                os.kill(self.pid, signal.SIGUSR1)

    def is_alone(self) -> bool:
        """Whether the trainer lives and was not killed, and no process lives that it ever started."""
        return survivors(self.pid, self.token) == {self.pid} and not (self._killed or self.has_ended())

    def kill(self) -> None:
        """SIGKILL to every process of the group. Thread-safe and idempotent."""
        with self._mutex:
            if self._gone:
                return
            self._killed = True
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._gone = True  # reaped, and with no group left: the id may be another process's from now on
            except PermissionError:
                if not self._has_ended():  # macOS refuses to signal a group of which only zombies are left
                    raise

    def kill_and_reap(self, timeout: float) -> bool:
        """Kill the trainer and every process that it started, and reap it; True once none is left.

        False after `timeout` seconds: a process cannot be killed yet, for example one inside a driver's system call.
        """
        deadline = time.monotonic() + timeout
        while True:
            self.kill()
            left = survivors(self.pid, self.token)
            for pid in left:
                with suppress(ProcessLookupError, PermissionError):  # the next round shows whether it is gone
                    os.kill(pid, signal.SIGKILL)
            if self.has_ended() and not left:
                with self._mutex:
                    self._popen.wait()
                    self._gone = True
                    self._socket.close()
                return True
            if time.monotonic() > deadline:
                log.warning("trainer_does_not_die", trainer=self.pid, processes=sorted(left))
                return False
            time.sleep(0.005)
