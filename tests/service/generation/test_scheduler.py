"""Which requests are generated, and what each is sent."""

import time
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from nanomoe.config import SamplingConfig
from service.generation.messages import Begun, Cancel, EngineDone, Failed
from tests.service.generation.driver import Driver, reference_tokens
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path / "tiny")


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_answered_with_its_text(tiny: TinyCheckpoint, stream: bool) -> None:
    driver = Driver()
    request_id = driver.ask(tiny.request("Era uma vez", 40), stream=stream)
    driver.finish(request_id)
    expected = reference_tokens(tiny, "Era uma vez", 40, SamplingConfig(temperature=0))
    begun, *chunks, done = driver.sent[request_id]
    assert isinstance(begun, Begun)
    assert [token for chunk in driver.chunks(request_id) for token in chunk.tokens] == expected
    assert "".join(chunk.text for chunk in driver.chunks(request_id)) == tiny.tokenizer.decode(expected)
    assert [chunk.finish_reason for chunk in driver.chunks(request_id)][-1] == "length"
    assert (len(chunks) > 1) == stream
    assert isinstance(done, EngineDone)
    assert (done.prompt_tokens, done.completion_tokens, done.window_slid) == (11, 40, True)
    assert begun.at <= done.first_token_at <= done.finished_at <= time.monotonic()


def test_every_choice_of_a_request_is_a_text_of_its_own(tiny: TinyCheckpoint) -> None:
    driver = Driver()
    request_id = driver.ask(tiny.request(n=3, temperature=1.0, seed=7))
    driver.finish(request_id)
    expected = {i: reference_tokens(tiny, "Era uma vez", 8, SamplingConfig(), seed=7, index=i) for i in range(3)}
    assert {chunk.index: list(chunk.tokens) for chunk in driver.chunks(request_id)} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == 3


def test_a_cancelled_request_is_sent_nothing_more_and_frees_its_slots(tiny: TinyCheckpoint) -> None:
    driver = Driver(max_running=2)
    long = driver.ask(tiny.request(max_new_tokens=10_000, n=2))
    waiting = driver.ask(tiny.request(max_new_tokens=1))
    withdrawn = driver.ask(tiny.request(max_new_tokens=1))
    while not driver.sent[long]:
        driver.turn()
    assert driver.n_continuations == 2
    driver.server.receive(Cancel(id=withdrawn))
    driver.turn()
    assert driver.sent[waiting] == []
    driver.server.receive(Cancel(id=long))
    driver.finish(waiting)
    assert driver.chunks(long) == []
    assert driver.sent[withdrawn] == []
    assert driver.n_continuations == 0


def test_a_request_joins_while_others_are_running(tiny: TinyCheckpoint) -> None:
    driver = Driver()
    long = driver.ask(tiny.request(max_new_tokens=10_000))
    while not driver.sent[long]:
        driver.turn()
    short = driver.ask(tiny.request(max_new_tokens=3))
    driver.finish(short)
    assert driver.n_continuations == 1
    assert driver.chunks(long) == []


def test_requests_that_waited_begin_when_every_slot_is_free_at_once(tiny: TinyCheckpoint) -> None:
    driver = Driver(max_running=2)
    ids = [driver.ask(tiny.request(max_new_tokens=2)) for _ in range(5)]
    driver.finish(*ids)
    assert [len(driver.chunks(request_id)) for request_id in ids] == [1] * 5


@pytest.mark.parametrize("method", ["submit", "step"])
def test_a_fault_while_generating_ends_the_requests_of_that_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    good, bad = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate(("good", "bad")))
    driver = Driver()
    served, failed = (driver.ask(tiny.request(max_new_tokens=100)) for tiny in (good, bad))
    while not (driver.sent[served] and driver.sent[failed]):
        driver.turn()

    def fault(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(driver.cache[bad.manifest_sha256].engine, method, fault)
    joining = driver.ask(bad.request())
    with capture_logs() as logged:
        driver.finish(served, failed)
    assert isinstance(driver.sent[served][-1], EngineDone)
    failure = driver.sent[failed][-1]
    assert isinstance(failure, Failed)
    assert (failure.code, failure.message) == ("generation_failed", "OutOfMemoryError: no memory is left")
    assert [(entry["event"], entry["exc_info"]) for entry in logged] == [("generation_failed", True)]
    again = driver.ask(bad.request())
    driver.finish(joining, again)
    assert isinstance(driver.sent[again][-1], EngineDone), "it was loaded anew"
    assert driver.n_continuations == 0


def test_a_device_that_is_lost_ends_the_engine(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    driver.finish(driver.ask(tiny.request()))

    def fault() -> None:
        raise torch.AcceleratorError("device-side assert triggered", 710)

    monkeypatch.setattr(driver.cache[tiny.manifest_sha256].engine, "step", fault)
    driver.ask(tiny.request())
    with pytest.raises(torch.AcceleratorError):
        driver.turn()
