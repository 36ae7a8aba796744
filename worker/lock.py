"""The lock of a slot: a file lock that only the trainer of a running job and the processes that it forks hold.

The supervisor opens the file anew before each claim, locks it, and sends the open file with the start message; then it
closes its own copy, and at the job's end the trainer closes the one that it received. Nobody unlocks: a lock is free
when the last copy is closed, and so exactly when no process of the job has it any more, whatever happened to the
supervisor. A stopped or killed supervisor's trainer can never share its device with a second one, and a child that
outlives its job keeps the slot locked.

Knows no job and no database. The lock (flock) is kept by the kernel, so it ends with its last holder.
"""

import fcntl
import json
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

from worker.survivors import started, survivors

Owner = dict[str, str | int | None]


class SlotLock:
    """An open file of a slot's lock, for one job."""

    def __init__(self, path: Path, token: str) -> None:
        """`token` identifies the trainer in the environment of all its processes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._token = token
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def acquire(self) -> bool:
        """Take the lock, for this process and for whoever is sent the open file; False when a job still holds it.

        Orphans of a dead supervisor of this machine are killed here, so that a later attempt succeeds. Raises OSError
        when the disk is full, and takes nothing then.
        """
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._kill_orphans_of_a_dead_supervisor()
            return False
        owner = _supervisor(os.getpid()) | {"trainer": self._token}
        content = json.dumps(owner).encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))  # not before: on a full disk the room might be gone
        return True

    def close(self) -> None:
        """Close this process's copy of the open file. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _kill_orphans_of_a_dead_supervisor(self) -> None:
        try:
            owner: Owner = json.loads(self._path.read_bytes())
        except ValueError:
            return  # its supervisor is writing it at this moment, so it lives
        token, pid = str(owner.pop("trainer")), owner["pid"]
        here = owner["machine"] == _machine()
        if here and isinstance(pid, int) and owner != _supervisor(pid):
            for left in survivors(None, token):
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)


def _supervisor(pid: int) -> Owner:
    return {"machine": _machine(), "pid": pid, "started": started(pid)}


def _machine() -> str:
    """The process id namespace: a container has its own."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}"
