"""The life of a trainer process: started warm, spoken to over pipes, ended with its whole group, proven dead.

Knows no job and no database. A trainer must be started from the main thread: the parent-death signal that it sets
fires when the thread that spawned it ends.
"""

import math
import os
import select
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import structlog

from worker.lock import SlotLock
from worker.protocol import Beat, FromTrainer, Start, ToTrainer, encode, parse_from_trainer
from worker.survivors import TOKEN_VARIABLE, survivors

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 0.25
"""How often a silent pipe is left to see whether its process has ended: a grandchild may keep the pipe open."""


@dataclass(frozen=True)
class Ended:
    """The trainer has ended, or has said something that is not the protocol. Nothing follows."""

    garbled: bool = False
    unheard: bool = False
    """Whether it was past the time at which a trainer ends itself that was told of no later one."""


@dataclass(frozen=True)
class Look:
    """Something changed in the database, or the worker is to drain."""


class TrainerProcess:
    """A trainer in a session and process group of its own, which holds the lock of its slot while it has a job."""

    def __init__(
        self, command: Sequence[str], lock: Path, environment: Mapping[str, str], *, until: float = math.inf
    ) -> None:
        """`until`: monotonic time at which the trainer ends itself, as the command says, unless a beat names a later
        one. Raises OSError when there is no process, no memory or no descriptor for it."""
        assert threading.current_thread() is threading.main_thread(), "the parent-death signal follows the thread"
        self.inbox: SimpleQueue[FromTrainer | Ended | Look] = SimpleQueue()
        """What the trainer says, its end, and what others put in to wake whoever waits here."""
        self._until = until
        self._token = uuid.uuid4().hex
        self.lock = SlotLock(lock, self._token)
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                pass_fds=(self.lock.descriptor,),
                env={**environment, TOKEN_VARIABLE: self._token},
            )
        except OSError:
            self.lock.hand_over()  # to nobody: it is tried again every second, with a descriptor each time
            raise
        self.pid = self._popen.pid
        assert self._popen.stdin is not None
        # A beat must never make the guard wait for a trainer that has stopped reading.
        os.set_blocking(self._popen.stdin.fileno(), False)
        self._one_at_a_time = threading.Lock()
        """Held while the trainer is spoken to, signalled or reaped: its process id and pipe must still be its own."""
        self._gone = False
        threading.Thread(target=self._read, name=f"read-{self.pid}", daemon=True).start()

    def next_message(self, timeout: float) -> FromTrainer | Ended | Look | None:
        """The next item of the inbox, or None when none came within `timeout` seconds."""
        try:
            return self.inbox.get(timeout=timeout)
        except Empty:
            return None

    # -- Speaking ------------------------------------------------------------------------------------------------

    def start(self, message: Start) -> None:
        """Give the trainer its job, and the slot's lock with it."""
        self.send(message)
        self.lock.hand_over()

    def send(self, message: ToTrainer) -> None:
        """Say something; a trainer that has ended, or reads nothing, does not hear it, which its end will show."""
        assert self._popen.stdin is not None
        rest = encode(message)
        with self._one_at_a_time:
            if self._gone:
                return
            try:
                while rest:
                    rest = rest[os.write(self._popen.stdin.fileno(), rest) :]
                if isinstance(message, Beat):
                    self._until = message.until
            except (BlockingIOError, BrokenPipeError):
                log.debug("trainer_does_not_listen", trainer=self.pid, message=message.type)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as stdout:
            garbled = not self._read_lines(stdout.fileno())
            self.inbox.put(Ended(garbled, unheard=time.monotonic() >= self._until))

    def _read_lines(self, pipe: int) -> bool:
        """Until the trainer has ended; False when it said something that is no message."""
        buffered = b""
        while True:
            if not select.select([pipe], [], [], _LOOK_SECONDS)[0]:
                if self.has_ended():
                    return True
                continue
            read = os.read(pipe, 1 << 16)
            if not read:
                return True
            *lines, buffered = (buffered + read).split(b"\n")
            for line in lines:
                try:
                    self.inbox.put(parse_from_trainer(line))
                except ValueError as error:
                    log.error("trainer_garbled", trainer=self.pid, line=line[:200], error=str(error))
                    return False

    # -- Ending --------------------------------------------------------------------------------------------------

    def has_ended(self) -> bool:
        """Whether the trainer itself has ended. It is not reaped where the system can tell without, so its ids still
        cannot be anybody else's."""
        with self._one_at_a_time:
            return self._has_ended()

    def _has_ended(self) -> bool:
        if self._popen.returncode is not None:
            return True
        if not hasattr(os, "waitid"):  # macOS before Python 3.13; the group's id stays ours while the group lives
            return self._popen.poll() is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    @property
    def exit_status(self) -> int:
        """After `bury`: the exit status, or minus the signal that ended it."""
        assert self._popen.returncode is not None
        return self._popen.returncode

    def terminate(self) -> None:
        """SIGTERM to the trainer: wake it from a system call, so that it sees the message that was sent."""
        with self._one_at_a_time:
            if not self._has_ended():
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every process of the group. From any thread, at any time, as often as one likes."""
        with self._one_at_a_time:
            if self._gone:
                return
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._gone = True  # reaped, and with no group left: the id may be somebody else's from now on
            except PermissionError:
                if not self._has_ended():  # macOS refuses to signal a group of which only zombies are left
                    raise

    def bury(self, timeout: float) -> bool:
        """Kill what is left of the trainer and of all that it started; True once no process of it lives.

        False after `timeout` seconds: something cannot be killed yet, for example a process in a driver's call.
        """
        give_up = time.monotonic() + timeout
        self.lock.hand_over()
        while True:
            self.kill()
            left = survivors(self.pid, self._token)
            for pid in left:
                with suppress(ProcessLookupError, PermissionError):  # the next look tells whether it is gone
                    os.kill(pid, signal.SIGKILL)
            if self.has_ended() and not left:
                with self._one_at_a_time:
                    self._popen.wait()
                    self._gone = True
                    assert self._popen.stdin is not None
                    self._popen.stdin.close()
                return True
            if time.monotonic() > give_up:
                log.warning("trainer_does_not_die", trainer=self.pid, processes=sorted(left))
                return False
            time.sleep(0.005)
