"""The engine's threads and process; test_engine_process.py runs it as a child of the API."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nanomoe.config import SamplingConfig
from service.generation.messages import (
    EngineDone,
    EngineStart,
    to_line,
)
from tests.service.generation.driver import Driver, reference_tokens
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path / "tiny")


def test_a_failure_is_sent_before_the_engine_waits_for_more_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate(("good", "bad")))
    driver = Driver(max_running=1)
    driver.finish(*(driver.ask(tiny.request()) for tiny in (good, bad)))
    driver.cache[bad.manifest_sha256].tokenizer = None  # type: ignore[assignment]
    first, second = (driver.ask(tiny.request()) for tiny in (good, bad))
    driver.finish(first)
    assert driver.sent[second] == []
    flushed: list[bytes] = []
    monkeypatch.setattr(driver.server, "_handle_inbox", lambda seconds: flushed.append(driver.output.getvalue()))
    driver.turn()
    assert flushed[0].count(b"generation_failed") == 1


def test_a_line_that_is_no_request_ends_the_process_with_its_traceback() -> None:
    start = EngineStart(parent=os.getpid(), device="cpu", cache_bytes=1, max_running=1)
    command = [sys.executable, "-m", "service.generation.engine"]
    ended = subprocess.run(command, input=to_line(start) + b"no request\n", capture_output=True, check=False)
    assert ended.returncode == 1
    assert b"Traceback" in ended.stderr


class Preparation:
    """Takes the place of `compiled_loops.prepare`; returns when the test lets it."""

    def __init__(self) -> None:
        self.calls = 0
        self.may_end = threading.Event()

    def __call__(self) -> bool:
        self.calls += 1
        return self.may_end.wait(30)


@pytest.fixture
def preparation(monkeypatch: pytest.MonkeyPatch) -> Preparation:
    preparation = Preparation()
    monkeypatch.setattr("service.generation.engine.compiled_loops.prepare", preparation)
    return preparation


def test_what_begins_before_the_loops_are_ready_is_answered_without_them_and_what_begins_later_with_them(
    tiny: TinyCheckpoint, preparation: Preparation
) -> None:
    driver = Driver()
    driver.server.prepare_loops()
    early, long = driver.ask(tiny.request("Era", 30)), driver.ask(tiny.request("Olá", 300))
    driver.finish(early)
    preparation.may_end.set()
    driver.use_loops()
    assert driver.n_continuations == 1, "the long one is being generated"
    late = driver.ask(tiny.request("Era", 30))
    driver.finish(late, long)
    ways = {name: driver.sent[i][-1] for name, i in (("early", early), ("long", long), ("late", late))}
    assert {name: done.numerics.split("; ")[1] for name, done in ways.items() if isinstance(done, EngineDone)} == {
        "early": "tensor operations", "long": "tensor operations", "late": "compiled loops"
    }  # fmt: skip
    for request_id, prompt, n in ((early, "Era", 30), (long, "Olá", 300), (late, "Era", 30)):
        tokens = [token for chunk in driver.chunks(request_id) for token in chunk.tokens]
        assert tokens == reference_tokens(tiny, prompt, n, SamplingConfig(temperature=0))
    assert driver.cache._replaced == []
    assert driver.n_continuations == 0


def test_a_checkpoint_that_cannot_be_read_any_more_is_served_as_it_was_loaded(
    tiny: TinyCheckpoint, preparation: Preparation
) -> None:
    driver = Driver()
    driver.server.prepare_loops()
    long = driver.ask(tiny.request(max_new_tokens=300))
    while not driver.sent[long]:
        driver.turn()
    (tiny.folder / "model.safetensors").unlink()
    preparation.may_end.set()
    driver.use_loops()
    again = driver.ask(tiny.request())
    driver.finish(long, again)
    assert isinstance(driver.sent[again][-1], EngineDone)


def test_an_engine_on_a_gpu_prepares_no_loops(preparation: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.generation.engine.find_device", lambda _: torch.device("cuda", 0))
    Driver().server.prepare_loops()
    assert preparation.calls == 0
    assert "loops" not in [thread.name for thread in threading.enumerate()]
