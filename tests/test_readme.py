"""The README is true: every command in it is run, every answer compared, every table made from the code.

The commands run one after the other in a copy of the project, in one shell, against the service that they start.
"""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numba
import pytest

from nanomoe.generation.kernels.loading import load_all
from service.app import create_app
from service.settings import Settings
from tests.documents import README, ROOT, readme, tracked
from tests.markdown import blocks, differences

TEXT = README.read_text("utf-8")
BLOCKS = blocks(TEXT)
PORT = 8000
"""The port in the README; the copy under test takes a free one."""

END = "\x1e"


class Shell:
    """One `bash` in which the README's blocks are run in turn, so that a variable set in one is there in the next."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._log = (folder.parent / "stderr").open("w+")
        self._bash = subprocess.Popen(
            ["bash", "-eo", "pipefail"], cwd=folder, env=environment, text=True, process_group=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def run(self, script: str) -> str:
        """What it prints; an AssertionError with all it said when a command of it fails."""
        assert self._bash.stdin
        assert self._bash.stdout
        self._bash.stdin.write(f"{script}\nprintf '{END}\\n'\n")
        self._bash.stdin.flush()
        printed: list[str] = []
        for line in self._bash.stdout:
            if line.endswith(END + "\n"):
                return "".join([*printed, line.removesuffix(END + "\n")])
            printed.append(line)
        self._log.seek(0)
        raise AssertionError(f"exit code {self._bash.wait()} of\n{script}\n{''.join(printed)}{self._log.read()}")

    def close(self) -> None:
        assert self._bash.stdin
        assert self._bash.stdout
        self._bash.stdin.close()
        self._bash.wait(timeout=60)
        self._bash.stdout.close()
        self._log.close()


@contextmanager
def _served(script: str, folder: Path, environment: dict[str, str], port: int) -> Iterator[None]:
    """A block that stays running, until Ctrl-C."""
    with (folder.parent / "serve").open("w+") as log:
        server = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=environment, stdout=log, stderr=log, process_group=0
        )
        try:
            while not _answers(port):
                assert server.poll() is None, "it ended by itself"
                time.sleep(0.1)
            yield
        finally:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(timeout=60)
            log.seek(0)
            print(log.read())  # pytest shows it when the test failed


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project as a new user has it, but with the environment that is already installed."""
    folder = tmp_path / "nanomoe"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    _bring_compiled_loops(folder)
    stale = subprocess.run(["make", "--question", ".venv/installed-dev"], cwd=folder).returncode
    assert stale == 0, "the environment is not the Makefile's own: run make setup"
    return folder


def _bring_compiled_loops(folder: Path) -> None:
    """Installing compiles them, ten seconds of work. numba keeps them by the path of their source."""
    load_all()
    kept = Path(numba.config.CACHE_DIR)
    to = folder / "nanomoe/generation/kernels/__pycache__" / kept.name
    shutil.copytree(kept, to)
    (to / _numbas_folder(ROOT)).rename(to / _numbas_folder(folder))


def _numbas_folder(root: Path) -> str:
    """Where numba keeps what it compiled of a checkout: a name made from the path of the sources."""
    return f"kernels_{hashlib.sha1(str(root / 'nanomoe/generation/kernels').encode()).hexdigest()}"  # noqa: S324


@pytest.mark.timeout(1200)
def test_every_command_runs_and_answers_as_printed(copy: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = ("NANOMOE_", "MAKE", "MFLAGS", "NUMBA_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "NANOMOE_PORT": str(port),
        "NANOMOE_ENGINE_NICE": "0",
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "TERM": "dumb",
    }
    wrong: list[str] = []
    with ExitStack() as running:
        shell = Shell(copy, environment)
        running.callback(shell.close)
        for block in filter(lambda block: block.is_run, BLOCKS):
            script = block.text.replace(f":{PORT}", f":{port}")
            if block.stays_running:
                running.enter_context(_served(script, copy, environment, port))
                continue
            if block.language == "python":
                script = f".venv/bin/python -W error - <<'END_OF_PYTHON'\n{script}END_OF_PYTHON"
            # With the README's own port a hint needs no address.
            printed = shell.run(script).replace(f" --url http://127.0.0.1:{port}", "").replace(f":{port}", f":{PORT}")
            if block.answer is not None:
                found = differences(block.answer, printed)
                wrong += [f"README line {block.answer.line}: {difference}" for difference in found]
    assert not wrong, "\n".join(wrong)


def test_a_block_that_is_not_run_says_why() -> None:
    commands = [block for block in BLOCKS if block.language in ("sh", "python")]
    assert [block.line for block in commands if not block.is_run and len(block.note) < len("not run: because")] == []
    assert [block.line for block in commands if block.is_run and block.note not in ("", "stays running")] == []


def test_every_block_names_its_language() -> None:
    assert [block.line for block in BLOCKS if block.language not in ("sh", "python", "json", "text")] == []


def test_tables_and_tree_are_made_from_the_code() -> None:
    assert readme(TEXT) == TEXT, "make readme writes them"


def test_the_routes_are_those_of_the_service(tmp_path: Path) -> None:
    paths = create_app(Settings(_env_file=None, data_dir=tmp_path)).openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    told = set(re.findall(r"^\| `([A-Z]+ /\S*)` \|", TEXT, re.MULTILINE))
    assert told == served


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target
