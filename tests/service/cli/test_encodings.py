"""Arguments in another encoding than the terminal's, and an output that lacks the characters it is given."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.cli import main
from service.jobs import queue
from tests.api import TEXT, Api
from tests.service.cli.conftest import Run

LATIN = os.fsdecode("olá".encode("latin-1"))
"""What Python makes of `olá` typed into a Latin-1 terminal: its last byte is no UTF-8."""

ROOT = Path(__file__).parents[3]


@pytest.fixture
def at(nanomoe: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("NANOMOE_URL", api.url)
    return nanomoe


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["inspect", "latest", LATIN], "PROMPT"),
        (["generate", "latest", LATIN], "PROMPT"),
        (["generate", LATIN, "x"], "JOB[@PERCENT]..."),
        (["explain", "latest", LATIN], "PROMPT"),
        (["explain", LATIN, "x"], "JOB[@PERCENT]"),
        (["score", LATIN, "-"], "JOB[@CHECKPOINT]"),
        (["submit", "-", "--name", LATIN], "--name"),
        (["submit", "-", "--tag", f"a={LATIN}"], "--tag"),
        (["submit", "-", "--set", f"tokenizer={LATIN}"], "--set"),
        (["train", "-", "-s", f"tokenizer={LATIN}"], "--set"),
        (["generate", "latest", "x", "--set", f"stop={LATIN}"], "--set"),
        (["jobs", "--tag", LATIN], "--tag"),
        (["jobs", "--status", LATIN], "--status"),
        (["jobs", "--url", f"http://{LATIN}"], "--url"),
        (["watch", LATIN], "JOB"),
        (["cancel", LATIN], "[JOB]"),
        (["knobs", LATIN], "NAME"),
        (["bench", "generate", "--models", LATIN], "--models"),
    ],
    ids=lambda value: ascii(" ".join(value)) if isinstance(value, list) else value,
)
def test_a_text_in_another_encoding_is_one_line_and_exit_code_2(at: Run, arguments: list[str], name: str) -> None:
    done = at(*arguments)
    assert (done.code, done.out) == (2, "")
    (given,) = [argument for argument in arguments if "\udce1" in argument]
    place = f"its character {given.index(chr(0xDCE1))} is the byte 0xe1"
    assert done.err == f"nanomoe: {name} {given!a} is not in this terminal's encoding, utf-8: {place}\n"


def test_a_setting_of_the_environment_in_another_encoding_is_refused(
    nanomoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOMOE_URL", f"http://{LATIN}")
    assert nanomoe("jobs").err.startswith("nanomoe: --url 'http://ol\\udce1' is not in this terminal's encoding")
    monkeypatch.delenv("NANOMOE_URL")
    monkeypatch.setenv("NANOMOE_DATA_DIR", LATIN)
    assert nanomoe("fsck").err == "nanomoe: NANOMOE_DATA_DIR: must be UTF-8, and holds '\\udce1'\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "-", "--set", r'tokenizer="\ud800"'],
        ["generate", "latest", "x", "--set", r'stop=["\ud800"]'],
    ],
    ids=lambda arguments: arguments[0],
)
def test_half_a_surrogate_pair_in_json_is_one_line_and_exit_code_2(at: Run, api: Api, arguments: list[str]) -> None:
    api.submit()
    done = at(*arguments, stdin=TEXT.encode())
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1


def test_files_whose_names_are_in_another_encoding_are_opened(at: Run, tmp_path: Path) -> None:
    (tmp_path / LATIN).write_text(TEXT, encoding="utf-8")
    (tmp_path / f"{LATIN}.json").write_text('{"tokenizer": "bytes"}')
    done = at("submit", LATIN, "--config", f"{LATIN}.json", "--json")
    assert (done.code, done.json["text"]["n_bytes"]) == (0, len(TEXT.encode()))
    assert at("submit", f"{LATIN}.txt").err == "nanomoe: cannot read ol\\udce1.txt: No such file or directory\n"


def test_the_home_folder_is_expanded_where_the_shell_leaves_it(
    at: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text('{"tokenizer": "bytes", "epochs": 9}')
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = at("submit", "~/text.txt", "--config=~/config.json", "--json")
    assert done.json["config"]["epochs"] == 9


Print = Callable[..., tuple[bytes, str]]


@pytest.fixture
def printed(at: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Print:
    """Runs a command whose standard output has another encoding: the bytes, and what is on standard error."""

    def run(encoding: str, *arguments: str) -> tuple[bytes, str]:
        sink = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink, encoding=encoding))
        monkeypatch.setattr(sys, "argv", ["nanomoe", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr().err
        assert not exit_.value.code, said
        return sink.getvalue(), said

    return run


NOTE = "nanomoe: some characters are not in this terminal's encoding, {}, and shown as their escapes; "


def test_unencodable_characters_are_escaped_and_reported_once(printed: Print, api: Api) -> None:
    job_id = api.submit(name="canção 🐈")["id"]
    shown, said = printed("ascii", "jobs", "--limit", "1")
    assert {r"can\xe7\xe3o", r"\U0001f408"} <= set(shown.decode("ascii").split())
    assert said == NOTE.format("ascii") + "PYTHONIOENCODING=utf-8 prints them\n"
    shown, said = printed("latin-1", "jobs", "--limit", "1")
    assert {"canção", r"\U0001f408"} <= set(shown.decode("latin-1").split())
    assert said.startswith(NOTE.format("latin-1"))
    shown, said = printed("utf-8", "jobs", "--limit", "1")
    assert {"canção", "🐈"} <= set(shown.decode().split())
    assert said == ""
    queue.request_cancel(api.db, job_id)


def test_our_own_symbols_have_ascii_substitutes(printed: Print, api: Api) -> None:
    shown, said = printed("ascii", "metrics", api.finished(name="feita"))
    assert shown.decode("ascii").splitlines()[2].split()[-1] == "-"
    assert any(line.strip().startswith("train loss 10.000 #") for line in shown.decode("ascii").splitlines())
    assert said == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("arguments", [["jobs", "--limit", "1"], ["watch"], ["metrics"]], ids=lambda value: value[0])
def test_json_is_json_in_every_encoding(printed: Print, api: Api, encoding: str, arguments: list[str]) -> None:
    api.finished(name="canção 🐈")
    shown, said = printed(encoding, *arguments, "--json")
    text = shown.decode(encoding)
    values = [json.loads(line) for line in text.splitlines()] if arguments[0] == "watch" else json.loads(text)
    assert ("canção 🐈" in json.dumps(values, ensure_ascii=False)) is (arguments[0] != "metrics")
    assert said == ""


@pytest.mark.parametrize("help_of", [[], ["generate"], ["bench", "jobs"]], ids=" ".join)
def test_help_fits_a_terminal_of_ascii(printed: Print, help_of: list[str]) -> None:
    shown, said = printed("ascii", *help_of, "--help")
    assert b"Usage: nanomoe" in shown
    assert (b"\\u" in shown, said) == (False, "")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=lambda environment: "+".join(environment),
)
def test_a_process_of_its_own_prints_whatever_its_locale_is(api: Api, environment: dict[str, str]) -> None:
    api.submit(name="canção")
    command = [sys.executable, "-c", "from service.cli import main; main()", "jobs", "--limit", "1", "--url", api.url]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | environment, check=True)
    is_escaped = rb"can\xe7\xe3o" in done.stdout.split()
    assert is_escaped or "canção".encode() in done.stdout.split()
    assert is_escaped is (b"are not in this terminal's encoding" in done.stderr)


def test_a_reader_that_goes_away_gets_no_traceback(api: Api) -> None:
    api.submit()
    command = [sys.executable, "-c", "from service.cli import main; main()", "jobs", "--json", "--url", api.url]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert done.stderr == b""
