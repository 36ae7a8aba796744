"""The command line, run in the process of the test."""

import io
import json
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from service.cli import main
from tests.api import TEXT, Api

TINY = ("--set", "tokenizer=bytes", "--set", "epochs=3")
"""Settings of a job of three steps."""


class Result:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Run(Protocol):
    def __call__(self, *arguments: str, stdin: bytes = b"") -> Result: ...


@pytest.fixture
def nanomoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder, with nothing set."""
    for name in ("NANOMOE_URL", "NANOMOE_HOST", "NANOMOE_PORT", "NANOMOE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["nanomoe", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return Result(int(exit_.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def at(nanomoe: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line with the address of a running API in its environment."""
    monkeypatch.setenv("NANOMOE_URL", api.url)
    return nanomoe


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    """The path of a text to train on."""
    path = tmp_path / "texto.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)
