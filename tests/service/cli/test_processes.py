"""Commands that start, watch and end processes: what is left after each way to go. All processes here are real."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from service.cli.processes import ChildFailed, Processes
from service.client import Client, Unreachable
from tests.api import TEXT, Api
from tests.service.cli.conftest import Run

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-c", "from service.cli import main; main()"]
TINY = {
    "tokenizer": "bytes", "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 32, "dropout": 0.0, "epochs": 8,
}  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """Nothing of the caller's settings but the engine's; modules are found without being installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NANOMOE_", "COLUMNS"))}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("NANOMOE_ENGINE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "NANOMOE_DATA_DIR": str(folder), "NANOMOE_PORT": "0"}


@contextmanager
def command(folder: Path, *arguments: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, which does not outlive the block."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        **{
            "text": True,
            "cwd": folder,
            "env": environment(folder),
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        | options,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()


def ended(processes: list[psutil.Process]) -> bool:
    """Whether all of them are gone, after at most 30 seconds."""
    return not psutil.wait_procs(processes, timeout=30)[1]


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_serve_stops_both_children_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with command(tmp_path, "serve", "--json") as serve:
        url = json.loads(line_of(serve))["url"]
        children = psutil.Process(serve.pid).children(recursive=True)
        assert len(children) >= 2
        with Client(url, retries=0) as client:
            assert client.health().status == "ok"
            serve.send_signal(number)
            _, said = serve.communicate(timeout=60)
            assert serve.returncode == 0
            assert "stopped" in said
            assert ended(children)
            with pytest.raises(Unreachable):
                client.health()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no parent-death signal")
def test_children_of_a_killed_serve_do_not_live_on(tmp_path: Path) -> None:
    # By the way: a folder of the caller's is not taken for a module of ours.
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "__main__.py").write_text("raise SystemExit(9)")
    with command(tmp_path, "serve", "--json") as serve:
        assert json.loads(line_of(serve))["url"]
        children = psutil.Process(serve.pid).children(recursive=True)
        assert len(children) >= 2
        serve.kill()
        assert ended(children)


def test_serve_opens_the_page_and_names_the_child_that_exited_and_stops_the_other(tmp_path: Path) -> None:
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {shlex.quote(str(opened))}\n')
    browser.chmod(0o755)
    with command(tmp_path, "serve", "--open", env=environment(tmp_path) | {"BROWSER": f"{browser} %s"}) as serve:
        url = re.fullmatch(r"nanomoe is at (\S+), its data in .*\n", line_of(serve))
        assert url is not None
        # Another terminal does not know the port: the hint says it.
        hint = f"try: nanomoe submit FILE --watch --url {url[1]}; docs at {url[1]}/docs; Ctrl-C stops both\n"
        assert line_of(serve) == hint
        while not opened.exists() or opened.read_text() != url[1]:
            assert serve.poll() is None
            time.sleep(0.05)
        children = psutil.Process(serve.pid).children()
        (worker,) = [child for child in children if "worker" in child.cmdline()]
        worker.kill()
        _, said = serve.communicate(timeout=60)
        assert serve.returncode == 1
        assert "nanomoe: the worker exited unexpectedly with exit code -9" in said
        assert ended(children)


def test_an_api_that_does_not_start_is_an_error_with_its_reason(tmp_path: Path) -> None:
    settings = environment(tmp_path) | {"NANOMOE_HOST": "0.0.0.0"}  # noqa: S104 - refused without keys
    with (
        Processes(settings, logs=tmp_path) as processes,
        pytest.raises(ChildFailed, match=r"(?s)api .* exit code 2\n.*keys"),
    ):
        processes.start_api()


def test_ctrl_c_while_watching_keeps_the_job_running_and_prints_how_to_resume(tmp_path: Path, api: Api) -> None:
    job_id = api.submit()["id"]
    with command(tmp_path, "watch", job_id, "--url", api.url) as watch:
        while line_of(watch) != "queued\n":
            assert watch.poll() is None
        watch.send_signal(signal.SIGINT)
        out, err = watch.communicate(timeout=30)
    assert watch.returncode == 130
    assert (out, err) == ("", f"the job goes on; come back with: nanomoe watch {job_id} --url {api.url}\n")
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "queued"


def test_a_terminal_of_80_columns_gets_a_bar_and_no_longer_line(tmp_path: Path, api: Api) -> None:
    claim = api.running(name="ao vivo")
    outside, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 80))
    shown = b""

    def read_until(wanted: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 30
        while wanted not in shown:
            assert select.select([outside], [], [], deadline - time.monotonic())[0], shown.decode()
            shown += os.read(outside, 65536)

    terminal = {"stdin": inside, "stdout": inside, "stderr": inside, "env": environment(tmp_path) | {"TERM": "xterm"}}
    with command(tmp_path, "watch", claim.job_id, "--url", api.url, **terminal) as watch:
        os.close(inside)
        read_until(b"3/500")
        api.record_checkpoint(claim, 25, 125)
        api.record_steps(claim, 4, 300)
        read_until(b"300/500")
        read_until(b"25 %")
        watch.send_signal(signal.SIGINT)
        read_until(f"nanomoe watch {claim.job_id}".encode())
        assert watch.wait(30) == 130
    os.close(outside)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "100.0 tok/s" in plain or "100 tok/s" in plain
    assert "━" in plain
    parts = [part for line in plain.split("\n") for part in line.split("\r")]
    # A command to be pasted is one line, which the terminal itself wraps.
    assert max(len(part) for part in parts if "nanomoe watch" not in part) <= 80


def test_submit_to_generate_on_the_command_line(tmp_path: Path, nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit, watch, generate and export, with a worker that really trains."""
    settings = [part for name, value in TINY.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    short = ("--set", "max_new_tokens=5", "--set", "temperature=0")
    with command(tmp_path / "data", "serve", "--json") as serve:
        monkeypatch.setenv("NANOMOE_URL", json.loads(line_of(serve))["url"])

        watched = nanomoe("submit", "-", *settings, "--watch", stdin=TEXT.encode())
        assert (watched.code, watched.err) == (0, "")
        assert [int(n) for n in re.findall(r"^ +(\d+) %", watched.out, re.M)] == [0, 25, 50, 75, 100]
        ending = r"^succeeded in [\d.]+ s; go on with: nanomoe generate [0-9a-f]{32} PROMPT --url \S+$"
        assert re.search(ending, watched.out, re.M)

        both = nanomoe("generate", "latest@25", "latest@100", "O gato", "--json", *short).json
        assert [answer["checkpoint"] for answer in both] == [25, 100]
        assert both[0]["seed"] == both[1]["seed"]
        alone = nanomoe("generate", "latest", "O gato", *short).out
        assert alone == f"O gato{both[1]['choices'][0]['text']}\n"
        assert nanomoe("generate", "latest", "O gato", "--stream", *short).out == alone
        assert nanomoe("generate", "latest@25", "latest", "O gato", "--stream").code == 2

        exported = nanomoe("export", "latest@100", "--to", "hf", str(tmp_path / "hf"))
        assert (exported.code, exported.err) == (0, "")
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "hf").iterdir()}
        assert "cpu" in nanomoe("workers").out


def test_demo_cleans_up_after_ctrl_c(tmp_path: Path) -> None:
    with command(tmp_path, "demo", "--data-dir", str(tmp_path / "kept")) as demo:
        while not line_of(demo).startswith("the service is at "):
            assert demo.poll() is None
        children = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        out, _ = demo.communicate(timeout=60)
        assert demo.returncode == 130
        assert out.endswith("interrupted; API and worker are stopped\n")
        assert ended(children)
    assert (tmp_path / "kept" / "nanomoe.db").exists()
