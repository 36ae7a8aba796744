import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanomoe.training.steps.loops.compiling import LOOPS
from worker import compiler


def in_folder(folder: Path) -> dict[str, str]:
    return os.environ | {"NUMBA_CACHE_DIR": str(folder)}


def test_where_the_loops_are_compiled_the_compiler_ends_at_once(tmp_path: Path) -> None:
    mark = f"""
from nanomoe.training.steps.loops.compiling import LOOPS
LOOPS.mark_compiled()
assert str(LOOPS.folder).startswith({str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-c", mark], env=in_folder(tmp_path), check=True)
    command = [sys.executable, "-m", "worker.compiler", str(os.getpid()), "json"]
    done = subprocess.run(command, env=in_folder(tmp_path), check=True, capture_output=True, text=True, timeout=60)
    assert "training_loops_compiling" not in done.stderr


def test_the_compiler_of_a_process_that_has_ended_ends_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker.compiler", "1", "json"]
    assert subprocess.run(command, env=in_folder(tmp_path), check=False, timeout=60).returncode == 1
    assert not list(tmp_path.iterdir())


def test_a_compiler_is_started_with_the_lowest_priority_and_a_session_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It finds nothing compiled, logs that it begins, and is killed: what it would leave is tested elsewhere."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    process = compiler.start_compiler("json")
    try:
        deadline = 60
        with Path(f"/proc/{process.pid}/stat").open() as stat:
            while deadline:
                stat.seek(0)
                fields = stat.read().rpartition(")")[2].split()
                if int(fields[16]) == 19:
                    break
                deadline -= process_waited(process)
        assert int(fields[16]) == 19
        assert int(fields[3]) == process.pid
    finally:
        process.kill()
        process.wait()
    assert LOOPS.folder.parent != tmp_path


def process_waited(process: subprocess.Popen[bytes]) -> int:
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        return 1
    raise AssertionError("the compiler ended before it began")
