"""A trainer's process on a machine that is out of resources, and on a system without /proc."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from worker.process import TrainerProcess

SLEEP = "import time; time.sleep(600)"
LEAVE_A_CHILD = "import os, time; os.fork() or time.sleep(600)"


def trainer(code: str = SLEEP) -> TrainerProcess:
    return TrainerProcess([sys.executable, "-S", "-c", code], os.environ)


def group_of(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if os.getpgid(process.pid) == leader else []
        except ProcessLookupError:
            continue
    return found


def test_a_trainer_that_cannot_be_started_costs_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = os.listdir("/dev/fd")  # noqa: PTH208 - the descriptors' numbers
    for _ in range(3):
        with pytest.raises(OSError, match="Too many"):
            trainer()
    assert os.listdir("/dev/fd") == before  # noqa: PTH208


@pytest.fixture(params=["waitid", "no waitid"])
def _as_on_macos(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc; a group of zombies cannot be signalled; before Python 3.13 only reaping tells that a child ended."""
    killpg = os.killpg

    def refuse_zombies(leader: int, number: int) -> None:
        members = group_of(leader)
        if members and all(member.status() == psutil.STATUS_ZOMBIE for member in members):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        killpg(leader, number)

    monkeypatch.setattr(os, "killpg", refuse_zombies)
    monkeypatch.setattr("worker.survivors._PROC", tmp_path / "proc")
    if request.param == "no waitid":
        monkeypatch.delattr(os, "waitid")


@pytest.mark.usefixtures("_as_on_macos")
def test_a_trainer_that_was_killed_is_reaped_on_macos() -> None:
    process = trainer()
    assert not process.has_ended()
    process.kill()
    while not process.has_ended():
        pass
    process.kill()
    process.wake()
    assert process.kill_and_reap(10)
    assert process.exit_status == -signal.SIGKILL
    process.kill()


@pytest.mark.usefixtures("_as_on_macos")
def test_processes_in_a_trainers_group_are_killed_on_macos() -> None:
    process = trainer(LEAVE_A_CHILD)
    while not process.has_ended():
        pass
    assert [member for member in group_of(process.pid) if member.status() != psutil.STATUS_ZOMBIE]
    assert process.kill_and_reap(10)
    assert process.exit_status == 0
    assert not [member for member in group_of(process.pid) if member.status() != psutil.STATUS_ZOMBIE]
