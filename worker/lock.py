"""The lock of a slot: a file lock that only the trainer of a running job and the processes that it forks hold.

The supervisor opens the file anew before each claim, locks it, and sends the open file with the start message; then it
closes its own copy, and at the job's end the trainer closes the one that it received. Nobody unlocks: a lock is free
when the last copy is closed, and so exactly when no process of the job has it any more, whatever happened to the
supervisor. A stopped or killed supervisor's trainer can never share its device with a second one, and a child that
outlives its job keeps the slot locked.

A GPU's lock lies in one place of its host, whoever runs the worker and wherever its data folder is: two trainers in its
memory are one too many. A CPU is shared by the system, and two data folders on one host are two hosts to it: the lock
of a slot on it lies in the data folder, and keeps apart those that would take each other's place.

Knows no job and no database. The lock (flock) is kept by the kernel, so it ends with its last holder.
"""

import fcntl
import json
import os
import signal
import socket
import stat
from contextlib import suppress
from pathlib import Path

from service.settings import Settings
from worker.devices import Device
from worker.survivors import started, survivors

Owner = dict[str, str | int | None]

_FOR_ALL_USERS = (Path("/run/lock"), Path("/tmp"))  # noqa: S108 # nothing is written there but the locks
"""Folders in which every user of a host can make files; the first that is there is taken by all of them."""


def lock_path(device: Device, number: int, settings: Settings) -> Path:
    """The lock of a slot, the index of which among the slots of its device is `number`."""
    folder = settings.data_dir / "locks"
    if device.is_gpu:
        folder = settings.lock_dir or _host_folder() / "nanomoe"
    return folder / f"{device.identity}.{number}.lock"


def _host_folder() -> Path:
    for folder in _FOR_ALL_USERS:
        with suppress(OSError):
            if folder.stat().st_mode & stat.S_IWOTH:
                return folder
    return _FOR_ALL_USERS[-1]


class SlotLock:
    """An open file of a slot's lock, for one job."""

    def __init__(self, path: Path, token: str) -> None:
        """`token` identifies the trainer in the environment of all its processes."""
        _make_folder(path.parent)
        self._path = path
        self._token = token
        self.descriptor = _open(path)

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
            token, pid, machine = str(owner.pop("trainer")), owner["pid"], owner["machine"]
        except (ValueError, KeyError, AttributeError, TypeError):
            return  # its supervisor is writing it at this moment, so it lives
        if machine == _machine() and isinstance(pid, int) and owner != _supervisor(pid):
            for left in survivors(None, token):
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)


def _make_folder(folder: Path) -> None:
    """Make a folder; one for all users of the host, where its parent is."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return
    if folder.parent.stat().st_mode & stat.S_IWOTH:
        folder.chmod(0o1777)


def _open(path: Path) -> int:
    """An open file of the lock, which is made if need be, so that all can lock it who can make files in its folder."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        # Not made where it is there: Linux lets nobody "create" a file of another user in such a folder.
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        with suppress(FileExistsError):  # another process was faster
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            if path.parent.stat().st_mode & stat.S_IWOTH:
                os.fchmod(descriptor, 0o666)
            return descriptor


def _supervisor(pid: int) -> Owner:
    return {"machine": _machine(), "pid": pid, "started": started(pid)}


def _machine() -> str:
    """The process id namespace: a container has its own."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}"
