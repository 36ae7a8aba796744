"""The compiled loops are made ready by a process of its own, and only where they never were compiled."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from nanomoe.generation.kernels import compiling
from service.generation import compiled_loops

ROOT = Path(__file__).parents[3]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the processes that are started, none of which is."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=9, stderr="the compiler is broken")

    monkeypatch.setattr("service.generation.compiled_loops.subprocess.run", run)
    return commands


def test_the_mark_tells_whether_all_loops_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.LOOPS, "folder", tmp_path / "kept")
    assert not compiling.are_compiled()
    compiling.mark_compiled()
    assert compiling.are_compiled()
    monkeypatch.setattr("numba.__version__", "another")
    assert not compiling.are_compiled()


def test_a_compiler_that_fails_is_told_of_and_loops_are_not_used(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "are_compiled", lambda: False)
    with capture_logs() as logged:
        assert not compiled_loops.prepare()
    assert [command[1:] for command in started] == [["-m", "service.generation.compiled_loops", str(os.getpid())]]
    assert logged[-1] == {
        "event": "loops_not_compiled", "log_level": "error", "status": 9, "stderr": "the compiler is broken"
    }  # fmt: skip


def test_what_was_compiled_once_is_loaded_without_a_compiler(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "are_compiled", lambda: True)
    monkeypatch.setattr("nanomoe.generation.kernels.loading.load_all", lambda: 0.1)
    assert compiled_loops.prepare()
    assert started == []


def test_a_compiler_without_its_engine_ends_before_it_begins() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.generation.compiled_loops", "1"], cwd=ROOT, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"")
