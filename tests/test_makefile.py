"""`make` on machines that are not ready: it finds an interpreter that fits, or says what to type."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")

FITS = f'case "$2" in *ensurepip*) exec {sys.executable} "$@";; esac; echo "$0 was asked for $*"; exit 9'
"""An interpreter that answers the Makefile's question and makes no environment."""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with the Makefile, and `bin/`, the only commands this machine has: no Python, no package manager."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "bin").mkdir()
    for command in ("sh", "make", "cat", "expand", "mkdir", "rm", "sed", "sort", "tail", "touch", "uname"):
        (tmp_path / "bin" / command).symlink_to(str(shutil.which(command)))
    return tmp_path


def _command(machine: Path, name: str, script: str) -> None:
    file = machine / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    file.chmod(0o755)


def _make(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine / "bin"), "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [machine / "bin" / "make", *arguments], cwd=machine, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("manager", "advice"),
    [
        ("brew", "  brew install python@3.13\n"),
        ("apt-get", "  sudo apt-get install -y python3 python3-venv\n"),
        ("dnf", "  sudo dnf install -y python3.13\n"),
        ("pacman", "  sudo pacman -S --needed python\n"),
        ("zypper", "  sudo zypper install -y python313\n"),
    ],
)
def test_without_python_it_says_what_to_type(machine: Path, manager: str, advice: str) -> None:
    _command(machine, manager, "")
    _command(machine, "apt-cache", "")
    done = _make(machine, "demo")
    assert done.returncode != 0
    assert advice in done.stdout
    assert not (machine / ".venv").exists()


def test_on_debian_it_names_the_newest_python_that_fits(machine: Path) -> None:
    _command(machine, "apt-get", "")
    _command(machine, "apt-cache", "echo python3.11-venv - venv; echo python3.12-venv - venv")
    assert "  sudo apt-get install -y python3.12 python3.12-venv\n" in _make(machine, "setup").stdout


def test_an_interpreter_that_does_not_fit_is_passed_over(machine: Path) -> None:
    _command(machine, "python3", "exit 1")
    _command(machine, "python3.12", FITS)
    assert "3.12 was asked for -m venv --clear .venv" in _make(machine, "setup").stdout


def test_an_interpreter_can_be_named(machine: Path) -> None:
    _command(machine, "mine", FITS)
    assert "mine was asked for -m venv --clear .venv" in _make(machine, "setup", f"PYTHON={machine}/bin/mine").stdout


def test_an_environment_that_was_moved_is_not_used(machine: Path) -> None:
    (machine / ".venv").mkdir()
    (machine / ".venv/installed").write_text("/somewhere/else/.venv\n", "utf-8")
    (machine / ".venv/installed-dev").touch()
    assert _make(machine, "--question", "setup").returncode == 1


def test_an_environment_that_is_ready_is_used_at_once(machine: Path) -> None:
    (machine / ".venv").mkdir()
    (machine / ".venv/installed").write_text(f"{machine.resolve()}/.venv\n", "utf-8")
    (machine / ".venv/installed-dev").touch()
    assert _make(machine, "--question", "setup").returncode == 0


def test_help_lists_every_target(machine: Path) -> None:
    targets = re.search(r"^\.PHONY: (help .*)$", MAKEFILE, re.MULTILINE)
    assert targets
    listed = re.findall(r"^  make (\w+)", _make(machine).stdout, re.MULTILINE)
    assert sorted(listed) == sorted(targets[1].split())
