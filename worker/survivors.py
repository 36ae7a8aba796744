"""Which processes of a trainer still live: none may be left before the slot claims its next job.

A process belongs to a trainer when it is in its session or process group, or when it carries the trainer's token in its
environment, as everything does that a trainer starts, even after it left the session. Only Linux's /proc can tell all
of that; elsewhere the process group alone is asked. Knows no job and no lock.
"""

import os
import time
from pathlib import Path

TOKEN_VARIABLE = "NANOMOE_TRAINER"  # noqa: S105 - a name, nothing secret
_PROC = Path("/proc")

_STATE, _GROUP, _SESSION, _START = 0, 2, 3, 19
"""Fields of /proc/PID/stat, counted from the state on; the start is in clock ticks since the machine's."""

_LOADING_TRIES = 20
_LOADING_SECONDS = 0.001
"""Between two looks at an empty environment. A program is loaded in less than one (assumed); one that was started
without any environment is looked at so often, in vain."""


def survivors(leader: int | None, token: str) -> set[int]:
    """The living processes of the session that `leader` opened, or that carry `token`.

    A zombie does not count: it has no memory and no device any more, only a parent that has not reaped it.
    """
    if not _PROC.joinpath("self").exists():
        return _group(leader) if leader is not None else set()
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    since = 0 if leader is None else int(started(leader) or 0)
    found = set()
    for pid in filter(str.isdecimal, os.listdir(_PROC)):  # noqa: PTH208 - a path for each costs as much again
        try:
            stat = _stat(pid)
            if int(stat[_START]) < since:
                continue  # the trainer started none that is older than itself
            belongs = leader in (int(stat[_GROUP]), int(stat[_SESSION])) or mark in _environment(pid).split(b"\0")
        except OSError:
            continue  # it ended during the scan, or is another user's
        if belongs and stat[_STATE] not in (b"Z", b"X"):
            found.add(int(pid))
    return found


def started(pid: int) -> str | None:
    """When a process started, to tell it from a later one with the same id; None if there is no such process."""
    if not _PROC.joinpath("self").exists():
        return "unknown" if _exists(pid) else None
    try:
        return _stat(pid)[_START].decode()
    except OSError:
        return None


def _stat(pid: int | str) -> list[bytes]:
    """The fields of /proc/PID/stat after the name in parentheses, from the state on (proc(5))."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def _environment(pid: str) -> bytes:
    """The environment of a process. While the kernel loads another program into one it is empty for a moment, and so it
    stays for what has no program: the kernel's own threads, and zombies."""
    for _ in range(_LOADING_TRIES):
        content = _read(pid, "environ")
        if content:
            break
        try:
            os.readlink(f"{_PROC}/{pid}/exe")  # noqa: PTH115 - a path costs as much again
        except OSError:
            break
        time.sleep(_LOADING_SECONDS)
    return content


def _read(pid: int | str, name: str) -> bytes:
    # Unbuffered: a scan of all processes is on the way from one job's end to the next one's start.
    with open(f"{_PROC}/{pid}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - as above
        return file.read()


def _group(leader: int) -> set[int]:
    try:
        os.killpg(leader, 0)
    except (ProcessLookupError, PermissionError):
        return set()  # macOS refuses to signal a group of which only zombies are left
    return {leader}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
