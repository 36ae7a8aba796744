"""Which processes of a trainer still live: none may be left before the slot claims its next job.

A process belongs to a trainer when it is in its session or process group, or when it carries the trainer's token in its
environment, as everything does that a trainer starts, even after it left the session. Only Linux's /proc can tell all
of that; elsewhere the process group alone is asked. Knows no job and no lock.
"""

import os
from pathlib import Path

TOKEN_VARIABLE = "NANOMOE_TRAINER"  # noqa: S105 - a name, nothing secret
_PROC = Path("/proc")


def survivors(leader: int | None, token: str) -> set[int]:
    """The living processes of the session that `leader` opened, or that carry `token`.

    A zombie does not count: it has no memory and no device any more, only a parent that has not reaped it.
    """
    if not _PROC.joinpath("self").exists():
        return _group(leader) if leader is not None else set()
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    found = set()
    for folder in _PROC.glob("[0-9]*"):
        try:
            state, _parent, group, session = _stat(folder)[:4]
            belongs = leader in (int(group), int(session)) or mark in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended during the scan, or is another user's
        if belongs and state not in "ZX":
            found.add(int(folder.name))
    return found


def started(pid: int) -> str | None:
    """When a process started, to tell it from a later one with the same id; None if there is no such process."""
    if not _PROC.joinpath("self").exists():
        return "unknown" if _exists(pid) else None
    try:
        return _stat(_PROC / str(pid))[19]
    except OSError:
        return None


def _stat(folder: Path) -> list[str]:
    """The fields of /proc/PID/stat after the name in parentheses, from the state on (proc(5))."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


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
