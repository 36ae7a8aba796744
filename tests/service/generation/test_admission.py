"""The API's side with the real engine process. Tests share one process where they can: torch takes seconds to load."""

import asyncio
import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from nanomoe.config import SamplingConfig
from nanomoe.generation.engine import Request, generate_reference
from service.errors import Invalid, ServiceError, TooManyRequests, Unavailable
from service.generation.admission import EngineResult, Generation, Summary
from service.generation.messages import Chunk
from service.settings import Settings
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


def _settings(**fields: object) -> Settings:
    return Settings(_env_file=None, engine_threads=1, **fields)  # type: ignore[arg-type, call-arg]


@pytest.fixture(scope="module")
def generation(run: Run) -> Iterator[Generation]:
    generation = Generation(_settings(engine_max_running=4, engine_max_new_tokens=100_000, engine_wait_seconds=60))
    run(generation.preload())
    yield generation
    run(generation.stop())


async def _failure(work: Coroutine[Any, Any, object]) -> ServiceError:
    with pytest.raises(ServiceError) as raised:
        await work
    return raised.value


async def _first(generation: Generation, tiny: TinyCheckpoint) -> contextlib.AbstractAsyncContextManager[Any]:
    """A long stream of which the first chunk has come."""
    stream = generation.stream(tiny.request(max_new_tokens=50_000))
    assert isinstance(await anext(stream), Chunk)
    return contextlib.aclosing(stream)


def test_who_asks_while_an_engine_starts_waits_for_that_one(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    preloaded = generation._process
    assert preloaded is not None
    run(generation.preload())
    run(generation.generate(tiny.request()))
    assert generation._process is preloaded


def _scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let engines be a few lines that need no torch; `told()` is the next message, `say()` answers."""
    head = "import json, sys, time\ntold = lambda: json.loads(sys.stdin.readline())\n"
    say = "say = lambda **message: print(json.dumps(message), flush=True)\ntold()\n"
    monkeypatch.setattr("service.generation.admission._ENGINE", ("-c", head + say + script))


def test_waiting_counts_from_an_engine_that_is_ready(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scripted(monkeypatch, """
at, request = time.monotonic(), told()
time.sleep(0.3)
done = {"id": request["id"], "prompt_tokens": 1, "completion_tokens": 0, "window_slid": False, "numerics": "",
        "first_token_at": at, "finished_at": at, "n_cached": 1, "cache_bytes": 1}
print(json.dumps({"type": "ready"}), json.dumps({"type": "begun", "id": request["id"], "at": at}),
      json.dumps(done | {"type": "done"}), sep="\\n", flush=True)
told()
say(type="begun", id=0, at=at)
told()
""")  # fmt: skip
    generation = Generation(_settings(engine_wait_seconds=0.1))
    run(generation.generate(tiny.request()))
    error = run(_failure(generation.generate(tiny.request())))
    assert error.code == "generation_wait_too_long"
    run(generation.stop())


def test_an_engine_that_does_not_become_ready_is_killed_and_answered_503(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scripted(monkeypatch, "while True: told()")
    generation = Generation(_settings(engine_start_seconds=0.3))

    async def ask_two() -> list[ServiceError]:
        return await asyncio.gather(*(_failure(generation.generate(tiny.request())) for _ in range(2)))

    for error in run(ask_two()):
        assert (error.status, error.code) == (503, "generation_unavailable")
        assert "not ready after 0.3 seconds" in error.detail
        assert error.retry_after is not None
    assert generation._process is None
    run(generation.stop())


def test_a_request_is_answered_with_its_text_and_its_timing(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    result: EngineResult = run(generation.generate(tiny.request("Olá", 40, n=2)))
    reference = Request(tiny.tokenizer.encode("Olá"), 40, SamplingConfig(temperature=0))
    expected = generate_reference(tiny.weights, tiny.config, reference)
    assert [choice.tokens for choice in result.choices] == [tuple(expected)] * 2
    assert {choice.text for choice in result.choices} == {tiny.tokenizer.decode(expected)}
    summary = result.summary
    assert (summary.prompt_tokens, summary.completion_tokens, summary.window_slid) == (4, 80, True)
    assert "float32" in summary.numerics
    timing = summary.timing
    assert 0 < timing.queue_seconds <= timing.first_token_seconds
    assert timing.tok_per_sec is not None
    assert timing.tok_per_sec > 0


def test_a_stream_brings_the_same_text_in_pieces(run: Run, generation: Generation, tiny: TinyCheckpoint) -> None:
    request = tiny.request("Olá", 200, temperature=1.0, seed=5, logprobs=0)

    async def streamed() -> list[Chunk | Summary]:
        return [item async for item in generation.stream(request)]

    whole: EngineResult = run(generation.generate(request))
    *chunks, summary = run(streamed())
    assert len(chunks) > 1
    assert "".join(chunk.text for chunk in chunks) == whole.choices[0].text
    assert sum((chunk.tokens for chunk in chunks), ()) == whole.choices[0].tokens
    assert len(whole.choices[0].logprobs or ()) == 200
    assert isinstance(summary, Summary)


def test_the_same_seed_gives_the_same_text_alone_and_in_a_crowd(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    requests = [tiny.request("Era " * (1 + n % 9), 30, temperature=1.0, seed=n) for n in range(1, 24)]

    async def crowd() -> list[EngineResult]:
        return await asyncio.gather(*(generation.generate(request) for request in requests))

    together = [result.choices for result in run(crowd())]
    assert [run(generation.generate(request)).choices for request in requests] == together


def test_a_closed_stream_frees_its_slot(run: Run, generation: Generation, tiny: TinyCheckpoint) -> None:
    async def fill_leave_and_ask_again() -> None:
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(4):
                await streams.enter_async_context(await _first(generation, tiny))
            waiting = asyncio.create_task(generation.generate(tiny.request(max_new_tokens=1)))
            await asyncio.sleep(0)
            assert (generation.n_running, generation.n_waiting) == (4, 1)
        await waiting
        assert (generation.n_running, generation.n_waiting) == (0, 0)

    run(fill_leave_and_ask_again())


def test_limits_are_checked_before_anything_is_sent(run: Run, tiny: TinyCheckpoint) -> None:
    generation = Generation(_settings(engine_max_new_tokens=10, engine_max_running=2))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 11}, "max_new_tokens_too_large"),
        ({"n": 3}, "n_too_large"),
        ({"prompt": ""}, "empty_prompt"),
    ]
    for fields, code in cases:
        error = run(_failure(generation.generate(tiny.request(**{"max_new_tokens": 1, **fields}))))
        assert isinstance(error, Invalid)
        assert error.code == code
        assert error.errors[0]["loc"] == ["body", *fields]
    assert generation.n_waiting == 0


@pytest.mark.parametrize("n_may_wait", [0, 1])
def test_what_begins_at_once_is_not_refused_and_of_the_others_so_many_wait(
    run: Run, generation: Generation, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, n_may_wait: int
) -> None:
    monkeypatch.setattr(generation, "_settings", generation._settings.model_copy(update={
        "engine_max_waiting": n_may_wait}))  # fmt: skip
    place = (str(tiny.folder), tiny.manifest_sha256)

    async def fill_every_place() -> ServiceError:
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(3):
                await streams.enter_async_context(await _first(generation, tiny))
            await generation.generate(tiny.request(max_new_tokens=1))
            await streams.enter_async_context(await _first(generation, tiny))
            waiting = [asyncio.create_task(generation.generate(tiny.request())) for _ in range(n_may_wait)]
            await asyncio.sleep(0)
            refused = await _failure(generation.generate(tiny.request()))
            await generation.score(*place, "Era uma vez")
        await asyncio.gather(*waiting)
        return refused

    async def ask_three_at_once() -> list[ServiceError]:
        asked = (generation.inspect(*place, "Era uma vez") for _ in range(3))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, ServiceError)]

    refused = run(fill_every_place())
    assert isinstance(refused, TooManyRequests)
    assert refused.code == "generation_queue_full"
    assert refused.retry_after is not None
    assert [error.code for error in run(ask_three_at_once())] == ["generation_queue_full"] * (2 - n_may_wait)


def test_a_request_that_waits_or_runs_too_long_is_ended(
    run: Run, generation: Generation, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_behind_others() -> ServiceError:
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(4):
                await streams.enter_async_context(await _first(generation, tiny))
            monkeypatch.setattr(generation, "_settings", _settings(engine_wait_seconds=0.2))
            return await _failure(generation.generate(tiny.request()))

    error = run(wait_behind_others())
    assert (error.status, error.code) == (503, "generation_wait_too_long")
    assert error.retry_after is not None
    monkeypatch.setattr(generation, "_settings", _settings(engine_request_seconds=0.3, engine_max_new_tokens=100_000))
    error = run(_failure(generation.generate(tiny.request(max_new_tokens=100_000))))
    assert (error.status, error.code) == (503, "generation_timeout")
    assert generation.n_running == 0


def test_a_damaged_checkpoint_is_answered_409(run: Run, generation: Generation, tiny: TinyCheckpoint) -> None:
    damaged = tiny.request().model_copy(update={"manifest_sha256": "0" * 64})
    error = run(_failure(generation.generate(damaged)))
    assert (error.status, error.code) == (409, "checkpoint_damaged")


def test_an_engine_that_dies_is_answered_503_and_restarted(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    async def kill_while_generating() -> ServiceError:
        async with await _first(generation, tiny):
            waiting = asyncio.create_task(_failure(generation.generate(tiny.request(max_new_tokens=50_000))))
            await asyncio.sleep(0)
            assert generation._process is not None
            os.kill(generation._process.pid, signal.SIGKILL)
            return await waiting

    error = run(kill_while_generating())
    assert isinstance(error, Unavailable)
    assert error.code == "engine_restarted"
    assert error.retry_after is not None
    assert len(run(generation.generate(tiny.request())).choices[0].tokens) == 8


def test_a_line_that_is_none_ends_the_engine_and_the_next_request_starts_another(
    run: Run, generation: Generation, tiny: TinyCheckpoint
) -> None:
    async def break_the_stream() -> ServiceError:
        async with await _first(generation, tiny):
            waiting = asyncio.create_task(_failure(generation.generate(tiny.request(max_new_tokens=50_000))))
            await asyncio.sleep(0)
            assert generation._process is not None
            assert generation._process.stdout is not None
            # Past what lies in the buffer already, which ends with a line or within one.
            generation._process.stdout.feed_data(b"\nno message\n")
            return await waiting

    with capture_logs() as logged:
        error = run(break_the_stream())
    assert error.code == "engine_restarted"
    assert "generation_engine_not_understood" in [entry["event"] for entry in logged]
    assert len(run(generation.generate(tiny.request())).choices[0].tokens) == 8


def test_a_line_that_is_too_long_ends_the_engine(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.generation.admission._LONGEST_LINE", 200)
    generation = Generation(_settings())
    error = run(_failure(generation.generate(tiny.request(max_new_tokens=1000))))
    assert (error.status, error.code) == (503, "engine_restarted")
    assert generation._process is None
    run(generation.stop())


@pytest.mark.parametrize("allowed", [False, True])
def test_an_engine_is_never_niced_back(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    asked: list[int] = []

    def setpriority(which: int, who: int, niceness: int) -> None:
        asked.append(niceness)
        if not allowed:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "getpriority", lambda which, who: 3)
    monkeypatch.setattr(os, "setpriority", setpriority)
    generation = Generation(_settings(engine_nice=2))  # little: the rest of its session's share is really taken
    with capture_logs() as logged:
        assert len(run(generation.generate(tiny.request())).choices[0].tokens) == 8
    assert asked == [3]
    assert ("generation_engine_not_niced" in [entry["event"] for entry in logged]) == (not allowed)
    run(generation.stop())


def test_an_engine_without_its_first_line_is_killed_and_forgotten(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def fail(pid: int, niceness: int) -> None:
        started.append(os.pidfd_open(pid))
        raise RuntimeError("a fault between the start and the first line")

    generation = Generation(_settings())
    with monkeypatch.context() as patched:
        patched.setattr("service.generation.admission._yield_cpu", fail)
        with pytest.raises(RuntimeError, match="a fault between"):
            run(generation.generate(tiny.request()))
    assert generation._process is None
    assert select.select(started, [], [], 10)[0], "a pidfd is readable once its process has ended"
    os.close(started[0])
    assert len(run(generation.generate(tiny.request())).choices[0].tokens) == 8
    run(generation.stop())


def test_an_engine_that_cannot_start_is_answered_503_without_trying_at_every_request(
    run: Run, tiny: TinyCheckpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    generation = Generation(_settings(engine_device="cuda:99"))
    for _ in range(2):
        error = run(_failure(generation.generate(tiny.request())))
        assert (error.status, error.code) == (503, "generation_unavailable")
        assert error.retry_after is not None
    assert capfd.readouterr().err.count("Traceback") == 1
    run(generation.stop())


def test_stopping_answers_what_is_being_generated_and_ends_the_process(run: Run, tiny: TinyCheckpoint) -> None:
    async def stop_while_generating() -> tuple[ServiceError, int | None, ServiceError]:
        generation = Generation(_settings(engine_max_new_tokens=100_000))
        async with await _first(generation, tiny):
            process = generation._process
            assert process is not None
            waiting = asyncio.create_task(_failure(generation.generate(tiny.request(max_new_tokens=50_000))))
            await asyncio.sleep(0)
            await generation.stop()
            return await waiting, process.returncode, await _failure(generation.generate(tiny.request()))

    during, status, after = run(stop_while_generating())
    assert (during.status, after.status) == (503, 503)
    assert status == 0


_ORPHAN = """
import asyncio, sys
from service.generation.messages import EngineRequest
from service.generation.admission import Generation
from service.settings import Settings

async def main():
    generation = Generation(Settings(_env_file=None, engine_max_new_tokens=10**6))
    assert "torch" not in sys.modules
    async for _ in generation.stream(EngineRequest.model_validate_json(sys.argv[1])):
        print(generation._process.pid, flush=True)

asyncio.run(main())
"""


def test_the_engine_dies_with_its_parent_which_never_loads_torch(tiny: TinyCheckpoint) -> None:
    request = tiny.request(max_new_tokens=10**6).model_dump_json()
    with subprocess.Popen([sys.executable, "-c", _ORPHAN, request], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert select.select([engine], [], [], 10)[0], "a pidfd is readable once its process has ended"
    finally:
        os.close(engine)


def test_the_engine_yields_the_cpu(run: Run, tiny: TinyCheckpoint) -> None:
    generation = Generation(_settings(engine_nice=10))
    run(generation.generate(tiny.request()))
    assert generation._process is not None
    threads = Path(f"/proc/{generation._process.pid}/task")
    assert {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads.iterdir()} == {10}
    session = Path(f"/proc/{generation._process.pid}/autogroup")
    assert not session.exists() or session.read_text().endswith(" nice 10\n")
    run(generation.stop())
