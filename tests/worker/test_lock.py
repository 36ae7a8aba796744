"""The lock of a slot, held by real processes."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from service.settings import Settings
from tests.worker.workplace import is_alive
from worker import lock as lock_module
from worker import survivors as survivors_module
from worker.devices import Device
from worker.lock import SlotLock, lock_path
from worker.survivors import TOKEN_VARIABLE, survivors

SLEEP = "import time; time.sleep(600)"


def trainer_with(lock: SlotLock, token: str) -> subprocess.Popen[bytes]:
    """A process that has a copy of the open file, as a trainer that was sent it."""
    environment = {**os.environ, TOKEN_VARIABLE: token}
    command = [sys.executable, "-S", "-c", SLEEP]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=(lock.descriptor,), env=environment)


GPU = Device("cuda:0", "H200", 2**37, "GPU-5d1f")
CPU = Device("cpu", "x86_64", 2**35, "host-cpu")


def test_workers_of_different_data_folders_do_not_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everybody = tmp_path / "run-lock"
    everybody.mkdir()
    everybody.chmod(0o1777)
    monkeypatch.setattr(lock_module, "_FOR_ALL_USERS", (tmp_path / "none", everybody))
    first, second = (Settings(_env_file=None, data_dir=tmp_path / name) for name in "ab")
    locks = [SlotLock(lock_path(GPU, 0, settings), "a") for settings in (first, second)]
    assert [lock.acquire() for lock in locks] == [True, False]
    locks[0].close()
    assert locks[1].acquire()
    # Another user can take it, and cannot remove it.
    path = everybody / "nanomoe" / "GPU-5d1f.0.lock"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o7777) == (0o666, 0o1777)
    chosen = first.model_copy(update={"lock_dir": tmp_path / "chosen"})
    assert lock_path(GPU, 1, chosen) == tmp_path / "chosen" / "GPU-5d1f.1.lock"


def test_workers_of_different_data_folders_share_a_cpu(tmp_path: Path) -> None:
    first, second = (Settings(_env_file=None, data_dir=tmp_path / name) for name in "ab")
    locks = [SlotLock(lock_path(CPU, 0, settings), "a") for settings in (first, second, second)]
    assert [lock.acquire() for lock in locks] == [True, True, False]


def test_a_lock_that_somebody_else_wrote_into_is_still_a_lock(tmp_path: Path) -> None:
    held, other = SlotLock(tmp_path / "slot", "a"), SlotLock(tmp_path / "slot", "b")
    assert held.acquire()
    for content in ("", "null", "[]", "{}", '{"trainer": "a"}', '{"trainer": 1, "pid": "x", "machine": []}'):
        (tmp_path / "slot").write_text(content)
        assert not other.acquire()


def test_the_lock_is_held_by_one_alone(tmp_path: Path) -> None:
    first, second = SlotLock(tmp_path / "slot", "a"), SlotLock(tmp_path / "slot", "b")
    assert first.acquire()
    assert not second.acquire()
    first.close()
    assert second.acquire()


def test_a_trainer_holds_the_lock_that_was_taken_after_it_started(tmp_path: Path) -> None:
    lock = SlotLock(tmp_path / "slot", "a")
    trainer = trainer_with(lock, "a")
    assert lock.acquire()
    lock.close()
    next_lock = SlotLock(tmp_path / "slot", "b")
    assert not next_lock.acquire()
    trainer.kill()
    trainer.wait()
    assert next_lock.acquire()


def test_orphans_of_a_dead_supervisor_are_killed_by_the_next_one(tmp_path: Path) -> None:
    # A supervisor that takes the lock, leaves it to a trainer and dies.
    code = (
        "import os, sys; from pathlib import Path; from tests.worker.test_lock import SlotLock, trainer_with; "
        "lock = SlotLock(Path(sys.argv[1]), 'left'); trainer = trainer_with(lock, 'left'); lock.acquire(); "
        "lock.close(); print(trainer.pid, flush=True); os._exit(0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "slot")]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[2])
    left = psutil.Process(int(said.stdout))
    assert is_alive(left.pid)
    lock = SlotLock(tmp_path / "slot", "next")
    assert not lock.acquire()  # it was held, and its holder is killed now
    while is_alive(left.pid):
        pass
    assert lock.acquire()


def test_a_survivor_is_found_whose_environment_is_empty_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is while the kernel loads a program: just after a child was started."""
    read, looks = survivors_module._read, []

    def read_late(pid: int | str, name: str) -> bytes:
        if name == "environ" and pid == str(child.pid):
            looks.append(pid)
            return b"" if len(looks) < 3 else read(pid, name)
        return read(pid, name)

    monkeypatch.setattr(survivors_module, "_read", read_late)
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", SLEEP],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, TOKEN_VARIABLE: "late"},
    )
    try:
        assert survivors(None, "late") == {child.pid}
    finally:
        child.kill()
        child.wait()


def test_survivors_are_found_in_the_session_and_beyond_it() -> None:
    environment = {**os.environ, TOKEN_VARIABLE: "found"}
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', sys.argv[1]], "
        "start_new_session=True, stdout=subprocess.DEVNULL); print(flush=True); sys.stdin.read()"
    )
    leader = subprocess.Popen(
        [sys.executable, "-S", "-c", code, SLEEP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )
    assert leader.stdout is not None
    leader.stdout.readline()
    found = survivors(leader.pid, "found")
    assert leader.pid in found
    assert len(found) == 2
    for pid in found:
        os.kill(pid, 9)
    leader.wait()
    leader.stdout.close()
    assert leader.stdin is not None
    leader.stdin.close()
    while survivors(leader.pid, "found"):
        pass
    assert survivors(None, "another") == set()
