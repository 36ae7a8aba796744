"""Which requests are admitted, and how each is answered, with the real engine process."""

import asyncio
import contextlib
from typing import Any

import pytest

from nanomoe.config import SamplingConfig
from nanomoe.generation.engine import Request, generate_reference
from service.errors import Invalid, ServiceError, TooManyRequests
from service.generation.admission import EngineResult, Generation, Summary
from service.generation.messages import Chunk
from tests.service.generation.generations import Run, failure, first_chunk, script_engines, settings
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


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
                await streams.enter_async_context(await first_chunk(generation, tiny))
            waiting = asyncio.create_task(generation.generate(tiny.request(max_new_tokens=1)))
            await asyncio.sleep(0)
            assert (generation.n_running, generation.n_waiting) == (4, 1)
        await waiting
        assert (generation.n_running, generation.n_waiting) == (0, 0)

    run(fill_leave_and_ask_again())


def test_limits_are_checked_before_anything_is_sent(run: Run, tiny: TinyCheckpoint) -> None:
    generation = Generation(settings(engine_max_new_tokens=10, engine_max_running=2))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 11}, "max_new_tokens_too_large"),
        ({"n": 3}, "n_too_large"),
        ({"prompt": ""}, "empty_prompt"),
    ]
    for fields, code in cases:
        error = run(failure(generation.generate(tiny.request(**{"max_new_tokens": 1, **fields}))))
        assert isinstance(error, Invalid)
        assert error.code == code
        assert error.errors[0]["loc"] == ["body", *fields]
    assert generation.n_waiting == 0


@pytest.mark.parametrize("n_may_wait", [0, 1])
def test_a_request_with_a_place_is_not_refused_and_as_many_wait_as_may(
    run: Run, generation: Generation, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, n_may_wait: int
) -> None:
    monkeypatch.setattr(generation, "_settings", generation._settings.model_copy(update={
        "engine_max_waiting": n_may_wait}))  # fmt: skip
    place = (str(tiny.folder), tiny.manifest_sha256)

    async def fill_every_place() -> ServiceError:
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(3):
                await streams.enter_async_context(await first_chunk(generation, tiny))
            await generation.generate(tiny.request(max_new_tokens=1))
            await streams.enter_async_context(await first_chunk(generation, tiny))
            waiting = [asyncio.create_task(generation.generate(tiny.request())) for _ in range(n_may_wait)]
            await asyncio.sleep(0)
            refused = await failure(generation.generate(tiny.request()))
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
                await streams.enter_async_context(await first_chunk(generation, tiny))
            monkeypatch.setattr(generation, "_settings", settings(engine_wait_seconds=0.2))
            return await failure(generation.generate(tiny.request()))

    error = run(wait_behind_others())
    assert (error.status, error.code) == (503, "generation_wait_too_long")
    assert error.retry_after is not None
    monkeypatch.setattr(generation, "_settings", settings(engine_request_seconds=0.3, engine_max_new_tokens=100_000))
    error = run(failure(generation.generate(tiny.request(max_new_tokens=100_000))))
    assert (error.status, error.code) == (503, "generation_timeout")
    assert generation.n_running == 0


def test_a_damaged_checkpoint_is_answered_409(run: Run, generation: Generation, tiny: TinyCheckpoint) -> None:
    damaged = tiny.request().model_copy(update={"manifest_sha256": "0" * 64})
    error = run(failure(generation.generate(damaged)))
    assert (error.status, error.code) == (409, "checkpoint_damaged")


def test_waiting_counts_from_an_engine_that_is_ready(
    run: Run, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_engines(monkeypatch, """
at, request = time.monotonic(), receive()
time.sleep(0.3)
done = {"id": request["id"], "prompt_tokens": 1, "completion_tokens": 0, "window_slid": False, "numerics": "",
        "first_token_at": at, "finished_at": at, "n_cached": 1, "cache_bytes": 1}
print(json.dumps({"type": "ready"}), json.dumps({"type": "begun", "id": request["id"], "at": at}),
      json.dumps(done | {"type": "done"}), sep="\\n", flush=True)
receive()
send(type="begun", id=0, at=at)
receive()
""")  # fmt: skip
    generation = Generation(settings(engine_wait_seconds=0.1))
    run(generation.generate(tiny.request()))
    error = run(failure(generation.generate(tiny.request())))
    assert error.code == "generation_wait_too_long"
    run(generation.stop())
