"""The engine's server, turn by turn in this process; test_generation.py runs it as the process that it is."""

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from nanomoe.config import SamplingConfig
from nanomoe.generation.engine import Request, generate_reference
from nanomoe.tokenizer import load_tokenizer
from service.generation.engine import LEAST_SHARE, Pace, Server
from service.generation.examiner import Examiner
from service.generation.messages import (
    Begun,
    Cancel,
    Chunk,
    Done,
    EngineRequest,
    Failed,
    FromEngine,
    Generate,
    Inspect,
    Inspected,
    Score,
    Scored,
    Start,
    parse_from_engine,
    to_line,
)
from tests.nanomoe.sample_tokenizers import PARAGRAPH, other_meaning
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint


class Driver:
    """Sends requests to a server and reads its lines."""

    def __init__(self, *, cache_bytes: int = 2**30, max_running: int = 8) -> None:
        self.output = io.BytesIO()
        start = Start(parent=os.getppid(), device="cpu", cache_bytes=cache_bytes, max_running=max_running)
        self.server = Server(start, self.output)
        self._n_read = 0
        self._last_id = 0
        self.said: dict[int, list[FromEngine]] = {}

    def ask(self, request: EngineRequest, *, stream: bool = False) -> int:
        """Send a request; returns its id."""
        self._last_id += 1
        self.said[self._last_id] = []
        self.server.receive(Generate(id=self._last_id, stream=stream, request=request))
        return self._last_id

    def turn(self) -> None:
        """One turn of the server, and read what it said."""
        self.server.turn()
        lines = self.output.getvalue()[self._n_read :].splitlines()
        self._n_read = len(self.output.getvalue())
        for line in lines:
            message = parse_from_engine(line)
            assert isinstance(message, Begun | Chunk | Done | Failed)
            self.said[message.id].append(message)

    def finish(self, *ids: int) -> None:
        """Turn until these requests are answered in full."""
        while not all(self.said[i] and isinstance(self.said[i][-1], Done | Failed) for i in ids):
            self.turn()

    def use_loops(self) -> None:
        """Turn until all that is loaded has its loops, without a token more than that takes."""
        for thread in threading.enumerate():
            if thread.name == "loops":
                thread.join()
        self.turn()  # it learns that they are ready
        while any(loaded.lacks_loops for loaded in self.server._cache.values()):
            self.turn()
            self.server._loader.submit(lambda: None).result()
        self.turn()

    def chunks(self, request_id: int) -> list[Chunk]:
        """The chunks that a request was sent."""
        return [message for message in self.said[request_id] if isinstance(message, Chunk)]


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path / "tiny")


def _reference(
    tiny: TinyCheckpoint, prompt: str, max_new_tokens: int, sampling: SamplingConfig, **fields: int
) -> list[int]:
    request = Request(tiny.tokenizer.encode(prompt), max_new_tokens, sampling, **fields)
    return generate_reference(tiny.weights, tiny.config, request)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_answered_with_its_text(tiny: TinyCheckpoint, stream: bool) -> None:
    driver = Driver()
    request_id = driver.ask(tiny.request("Era uma vez", 40), stream=stream)
    driver.finish(request_id)
    expected = _reference(tiny, "Era uma vez", 40, SamplingConfig(temperature=0))
    begun, *chunks, done = driver.said[request_id]
    assert isinstance(begun, Begun)
    assert [token for chunk in driver.chunks(request_id) for token in chunk.tokens] == expected
    assert "".join(chunk.text for chunk in driver.chunks(request_id)) == tiny.tokenizer.decode(expected)
    assert [chunk.finish_reason for chunk in driver.chunks(request_id)][-1] == "length"
    assert (len(chunks) > 1) == stream
    assert isinstance(done, Done)
    assert (done.prompt_tokens, done.completion_tokens, done.window_slid) == (11, 40, True)
    assert begun.at <= done.first_token_at <= done.finished_at <= time.monotonic()


def test_a_checkpoint_is_read_with_the_tokenizer_in_its_files_whatever_its_name_stands_for_today(
    tmp_path: Path,
) -> None:
    earlier = other_meaning(load_tokenizer("ptbr-8k"))
    made = write_tiny_checkpoint(tmp_path / "earlier", tokenizer=earlier)
    driver = Driver()
    request_id = driver.ask(made.request("Era uma vez", 8))
    driver.finish(request_id)
    expected = _reference(made, "Era uma vez", 8, SamplingConfig(temperature=0))
    (chunk,) = driver.chunks(request_id)
    assert (list(chunk.tokens), chunk.text) == (expected, earlier.decode(expected))

    there = {"id": 1, "folder": str(made.folder), "manifest_sha256": made.manifest_sha256}
    for question in (Score(**there, text=PARAGRAPH), Inspect(**there, prompt="Era uma vez")):
        answer = Examiner(torch.device("cpu")).answer(question)
        assert isinstance(answer, Scored | Inspected)
        text = PARAGRAPH if isinstance(question, Score) else "Era uma vez"
        assert [token.token for token in answer.tokens] == earlier.encode(text)
        assert "".join(token.text for token in answer.tokens) == text
    assert earlier.encode(PARAGRAPH) != load_tokenizer("ptbr-8k").encode(PARAGRAPH)


def test_every_choice_of_a_request_is_a_text_of_its_own(tiny: TinyCheckpoint) -> None:
    driver = Driver()
    request_id = driver.ask(tiny.request(n=3, temperature=1.0, seed=7))
    driver.finish(request_id)
    expected = {i: _reference(tiny, "Era uma vez", 8, SamplingConfig(), seed=7, index=i) for i in range(3)}
    assert {chunk.index: list(chunk.tokens) for chunk in driver.chunks(request_id)} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == 3


def test_a_stop_string_across_tokens_ends_a_text_and_frees_its_slot(tiny: TinyCheckpoint) -> None:
    text = tiny.tokenizer.decode(_reference(tiny, "Era", 30, SamplingConfig(), seed=1))
    stop = text[9:12]
    driver = Driver()
    request_id = driver.ask(tiny.request("Era", 30, temperature=1.0, seed=1, stop=(stop,)), stream=True)
    driver.finish(request_id)
    assert "".join(chunk.text for chunk in driver.chunks(request_id)) == text[: text.find(stop)]
    assert driver.chunks(request_id)[-1].finish_reason == "stop"
    assert driver.server.n_sequences == 0


def test_logprobs_name_each_token_and_its_rivals(tiny: TinyCheckpoint) -> None:
    driver = Driver()
    request_id = driver.ask(tiny.request(max_new_tokens=4, logprobs=2), stream=True)
    driver.finish(request_id)
    for chunk in driver.chunks(request_id):
        assert chunk.logprobs is not None
        for token, logprobs in zip(chunk.tokens, chunk.logprobs, strict=True):
            assert logprobs.chosen == logprobs.likeliest[0], "greedy takes the likeliest"
            assert logprobs.chosen.token == token
            assert logprobs.chosen.text == tiny.tokenizer.decode([token])
            assert logprobs.likeliest[1].logprob <= logprobs.chosen.logprob < 0


def test_a_cancelled_request_says_nothing_more_and_frees_its_slots(tiny: TinyCheckpoint) -> None:
    driver = Driver(max_running=2)
    long = driver.ask(tiny.request(max_new_tokens=10_000, n=2))
    waiting = driver.ask(tiny.request(max_new_tokens=1))
    withdrawn = driver.ask(tiny.request(max_new_tokens=1))
    while not driver.said[long]:
        driver.turn()
    assert driver.server.n_sequences == 2
    driver.server.receive(Cancel(id=withdrawn))
    driver.turn()
    assert driver.said[waiting] == []
    driver.server.receive(Cancel(id=long))
    driver.finish(waiting)
    assert driver.chunks(long) == []
    assert driver.said[withdrawn] == []
    assert driver.server.n_sequences == 0


def test_a_request_joins_while_others_are_running(tiny: TinyCheckpoint) -> None:
    driver = Driver()
    long = driver.ask(tiny.request(max_new_tokens=10_000))
    while not driver.said[long]:
        driver.turn()
    short = driver.ask(tiny.request(max_new_tokens=3))
    driver.finish(short)
    assert driver.server.n_sequences == 1
    assert driver.chunks(long) == []


def test_requests_that_waited_begin_when_every_slot_is_free_at_once(tiny: TinyCheckpoint) -> None:
    driver = Driver(max_running=2)
    ids = [driver.ask(tiny.request(max_new_tokens=2)) for _ in range(5)]
    driver.finish(*ids)
    assert [len(driver.chunks(request_id)) for request_id in ids] == [1] * 5


def test_the_least_recently_used_checkpoint_leaves_a_full_cache(tmp_path: Path) -> None:
    a, b, c = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate("abc"))
    measuring = Driver()
    measuring.finish(measuring.ask(a.request()))
    n_bytes = sum(loaded.engine.n_bytes for loaded in measuring.server._cache.values())
    driver = Driver(cache_bytes=int(2.5 * n_bytes))
    for tiny in (a, b, a, c):
        driver.finish(driver.ask(tiny.request()))
    assert driver.server.loaded == [a.manifest_sha256, c.manifest_sha256]


def test_a_checkpoint_in_use_is_never_dropped(tmp_path: Path) -> None:
    a, b = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate("ab"))
    driver = Driver(cache_bytes=1)
    long = driver.ask(a.request(max_new_tokens=10_000))
    while not driver.said[long]:
        driver.turn()
    other = driver.ask(b.request())
    for _ in range(50):
        driver.turn()
    assert driver.said[other] == [], "it waits for room"
    driver.server.receive(Cancel(id=long))
    driver.finish(other)
    assert driver.server.loaded == [b.manifest_sha256]


def test_a_damaged_checkpoint_fails_its_requests_only(tmp_path: Path) -> None:
    good, bad, lost = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate(("good", "bad", "lost")))
    weights = bad.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    (lost.folder / "tokenizer.json").unlink()
    driver = Driver()
    served, damaged, unreadable = (driver.ask(tiny.request()) for tiny in (good, bad, lost))
    driver.finish(served, damaged, unreadable)
    assert isinstance(driver.said[served][-1], Done)
    failures = [driver.said[i][-1] for i in (damaged, unreadable)]
    assert all(isinstance(failure, Failed) for failure in failures)
    assert [failure.code for failure in failures if isinstance(failure, Failed)] == [
        "checkpoint_damaged",
        "checkpoint_damaged",
    ]
    assert driver.server.loaded == [good.manifest_sha256]


def test_a_checkpoint_that_makes_no_model_is_reported(tmp_path: Path) -> None:
    tiny = write_tiny_checkpoint(tmp_path / "odd", bias=False, claimed={"n_layer": 3})
    driver = Driver()
    request_id = driver.ask(tiny.request())
    with capture_logs() as logged:
        driver.finish(request_id)
    (failure,) = driver.said[request_id]
    assert isinstance(failure, Failed)
    assert failure.code == "checkpoint_unreadable"
    assert "transformer.h.2" in failure.message
    assert [(entry["event"], entry["exc_info"]) for entry in logged] == [("checkpoint_unreadable", True)]


@pytest.mark.parametrize("method", ["submit", "step"])
def test_a_fault_while_generating_ends_the_requests_of_that_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    good, bad = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate(("good", "bad")))
    driver = Driver()
    served, failed = (driver.ask(tiny.request(max_new_tokens=100)) for tiny in (good, bad))
    while not (driver.said[served] and driver.said[failed]):
        driver.turn()

    def fault(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(driver.server._cache[bad.manifest_sha256].engine, method, fault)
    joining = driver.ask(bad.request())
    with capture_logs() as logged:
        driver.finish(served, failed)
    assert isinstance(driver.said[served][-1], Done)
    failure = driver.said[failed][-1]
    assert isinstance(failure, Failed)
    assert (failure.code, failure.message) == ("generation_failed", "OutOfMemoryError: no memory is left")
    assert [(entry["event"], entry["exc_info"]) for entry in logged] == [("generation_failed", True)]
    again = driver.ask(bad.request())
    driver.finish(joining, again)
    assert isinstance(driver.said[again][-1], Done), "it was loaded anew"
    assert driver.server.n_sequences == 0


def test_a_failure_is_told_before_the_engine_waits_for_more_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (write_tiny_checkpoint(tmp_path / name, seed=n) for n, name in enumerate(("good", "bad")))
    driver = Driver(max_running=1)
    driver.finish(*(driver.ask(tiny.request()) for tiny in (good, bad)))
    driver.server._cache[bad.manifest_sha256].tokenizer = None  # type: ignore[assignment]
    first, second = (driver.ask(tiny.request()) for tiny in (good, bad))
    driver.finish(first)
    assert driver.said[second] == []
    told: list[bytes] = []
    monkeypatch.setattr(driver.server, "_listen", lambda patience: told.append(driver.output.getvalue()))
    driver.turn()
    assert told[0].count(b"generation_failed") == 1


def test_a_device_that_is_lost_ends_the_engine(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    driver.finish(driver.ask(tiny.request()))

    def fault() -> None:
        raise torch.AcceleratorError("device-side assert triggered", 710)

    monkeypatch.setattr(driver.server._cache[tiny.manifest_sha256].engine, "step", fault)
    driver.ask(tiny.request())
    with pytest.raises(torch.AcceleratorError):
        driver.turn()


def test_a_line_that_is_no_request_ends_the_process_with_its_traceback() -> None:
    start = Start(parent=os.getpid(), device="cpu", cache_bytes=1, max_running=1)
    command = [sys.executable, "-m", "service.generation.engine"]
    ended = subprocess.run(command, input=to_line(start) + b"no request\n", capture_output=True, check=False)
    assert ended.returncode == 1
    assert b"Traceback" in ended.stderr


def test_few_texts_give_way_where_others_want_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr("service.generation.engine.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("service.generation.engine.time.thread_time", lambda: clock["cpu"])
    pace = Pace()

    def step(wall: float, cpu: float, *, alone: bool = True) -> float:
        with pace.working(alone=alone):
            clock["wall"] += wall
            clock["cpu"] += cpu
        return pace.pause

    assert step(0.03, 0.03) == 0
    assert step(0.03, 0.02) == pytest.approx(0.02 / LEAST_SHARE - 0.03)
    clock["wall"] += pace.pause
    assert step(0.001, 0.001) > 0.005, "one quick step is no proof that the others have gone"
    assert step(0.03, 0.01, alone=False) == 0
    assert step(0.03, 0.03) == 0


@pytest.mark.parametrize("granted", [0.05, LEAST_SHARE, 0.5, 0.8])
def test_giving_way_leaves_a_text_its_share_of_a_core_or_all_that_the_system_grants(
    monkeypatch: pytest.MonkeyPatch, granted: float
) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr("service.generation.engine.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("service.generation.engine.time.thread_time", lambda: clock["cpu"])
    pace = Pace()
    for _ in range(1000):
        with pace.working(alone=True):
            clock["wall"] += 0.001 / granted
            clock["cpu"] += 0.001
        clock["wall"] += pace.pause
    assert clock["cpu"] / clock["wall"] == pytest.approx(min(granted, LEAST_SHARE), rel=0.1)


def test_a_step_that_waited_long_for_the_processor_is_made_up_for_by_those_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr("service.generation.engine.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("service.generation.engine.time.thread_time", lambda: clock["cpu"])
    pace = Pace()
    for n in range(3000):
        with pace.working(alone=True):
            clock["wall"] += 0.1 if n % 10 == 0 else 0.001
            clock["cpu"] += 0.001
        clock["wall"] += pace.pause
    assert clock["cpu"] / clock["wall"] == pytest.approx(10 * 0.001 / (0.1 + 9 * 0.001), rel=0.1)


class Preparation:
    """Stands for `loops.prepare`: ends when it is told to."""

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
    assert driver.server.n_sequences == 1, "the long one is being generated"
    late = driver.ask(tiny.request("Era", 30))
    driver.finish(late, long)
    ways = {name: driver.said[i][-1] for name, i in (("early", early), ("long", long), ("late", late))}
    assert {name: done.numerics.split("; ")[1] for name, done in ways.items() if isinstance(done, Done)} == {
        "early": "tensor operations", "long": "tensor operations", "late": "compiled loops"
    }  # fmt: skip
    for request_id, prompt, n in ((early, "Era", 30), (long, "Olá", 300), (late, "Era", 30)):
        tokens = [token for chunk in driver.chunks(request_id) for token in chunk.tokens]
        assert tokens == _reference(tiny, prompt, n, SamplingConfig(temperature=0))
    assert driver.server._superseded == []
    assert driver.server.n_sequences == 0


def test_a_checkpoint_that_cannot_be_read_any_more_is_served_as_it_was_loaded(
    tiny: TinyCheckpoint, preparation: Preparation
) -> None:
    driver = Driver()
    driver.server.prepare_loops()
    long = driver.ask(tiny.request(max_new_tokens=300))
    while not driver.said[long]:
        driver.turn()
    (tiny.folder / "model.safetensors").unlink()
    preparation.may_end.set()
    driver.use_loops()
    again = driver.ask(tiny.request())
    driver.finish(long, again)
    assert isinstance(driver.said[again][-1], Done)


def test_an_engine_on_a_gpu_prepares_no_loops(preparation: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.generation.engine.find_device", lambda _: torch.device("cuda", 0))
    Driver().server.prepare_loops()
    assert preparation.calls == 0
    assert "loops" not in [thread.name for thread in threading.enumerate()]
