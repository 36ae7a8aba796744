"""The README and the pages of `docs/` are true: every command in them is run, and every answer compared.

The commands run one after the other in a copy of the project, against the service that the README starts. Each page has
a shell of its own: it needs that service, and what it sets itself.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import httpx
import pytest

from nanomoe.generation.kernels.compiling import LOOPS as GENERATION_LOOPS
from nanomoe.generation.kernels.loading import load_all as load_generation_loops
from nanomoe.training.steps.loading import load_all as load_training_loops
from nanomoe.training.steps.loops.compiling import LOOPS as TRAINING_LOOPS
from tests.documents import DOCS, PAGES, README, ROOT, TRANSLATIONS, tracked
from tests.markdown import Block, blocks, differences

RUN_HERE = (README, *(DOCS / f"{name}.md" for name in ("routes", "sweeps", "metrics", "mixture_of_experts", "running")))
"""In this order: the README starts the service, and the last page backs up what the others have made."""

RUN_ELSEWHERE = {
    DOCS / "client.md": "tests/service/client/test_alone.py",
    DOCS / "openai.md": "tests/service/http/routes/test_evaluation.py",
}
PORT = 8000
"""The port in the documents; the copy under test takes a free one."""

END = "\x1e"


class Shell:
    """One `bash` in which a page's blocks are run in turn, so that a variable set in one is there in the next."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._log = TemporaryFile("w+")  # noqa: SIM115 - closed with the shell
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
    """Installing compiles those of generation, and the first job those of training: half a minute of work."""
    for package, loops, load_all in (
        ("nanomoe/generation/kernels", GENERATION_LOOPS, load_generation_loops),
        ("nanomoe/training/steps/loops", TRAINING_LOOPS, load_training_loops),
    ):
        load_all()
        to = folder / package / "__pycache__" / loops.folder.name
        shutil.copytree(loops.folder, to)
        (to / _numbas_folder(ROOT / package)).rename(to / _numbas_folder(folder / package))


def _numbas_folder(package: Path) -> str:
    """Where numba keeps what it compiled of a package: a name made from its path."""
    return f"{package.name}_{hashlib.sha1(str(package).encode()).hexdigest()}"  # noqa: S324


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
        for page in RUN_HERE:
            with closing(Shell(copy, environment)) as shell:
                for block in filter(lambda block: block.is_run, blocks(page.read_text("utf-8"))):
                    if block.stays_running:
                        script = block.text.replace(f":{PORT}", f":{port}")
                        running.enter_context(_served(script, copy, environment, port))
                    else:
                        wrong += [f"{page.name}:{line}" for line in _wrong(shell, block, port)]
    assert not wrong, "\n".join(wrong)


def _wrong(shell: Shell, block: Block, port: int) -> Iterator[str]:
    """Run a block; what its answer should not have been, with the line."""
    script = block.text.replace(f":{PORT}", f":{port}")
    if block.language == "python":
        script = f".venv/bin/python -W error - <<'END_OF_PYTHON'\n{script}END_OF_PYTHON"
    # With the documents' own port a hint needs no address.
    printed = shell.run(script).replace(f" --url http://127.0.0.1:{port}", "").replace(f":{port}", f":{PORT}")
    if block.answer is not None:
        for difference in differences(block.answer, printed):
            yield f"{block.answer.line}: {difference}"


def test_every_page_with_commands_has_a_test_that_runs_them() -> None:
    with_commands = {
        page
        for page in PAGES
        if page not in TRANSLATIONS and any(block.is_run for block in blocks(page.read_text("utf-8")))
    }
    assert with_commands == {*RUN_HERE, *RUN_ELSEWHERE}
    for page, test in RUN_ELSEWHERE.items():
        assert page.name in (ROOT / test).read_text("utf-8")
