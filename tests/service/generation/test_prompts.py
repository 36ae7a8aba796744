"""Several prompts of one request, over a generation that a test decides."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from service.errors import Invalid, ServiceError, TooManyRequests, Unavailable
from service.generation.admission import Generation, Summary
from service.generation.answers import Timing
from service.generation.messages import Chunk, EngineRequest
from service.generation.prompts import Count, Gain, continue_all


def _request(name: str) -> EngineRequest:
    return EngineRequest(folder="/", manifest_sha256="", prompt=name, max_new_tokens=1)


class Scripted:
    """Continues every prompt by itself; some fail."""

    def __init__(self, failures: dict[str, Exception] | None = None) -> None:
        self._failures = failures or {}
        self.running: set[str] = set()
        self.most_running = 0
        self.begun: list[tuple[str, bool]] = []
        """The prompts, and whether each followed another."""
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def stream(
        self, request: EngineRequest, *, in_chunks: bool, follows: bool
    ) -> AsyncGenerator[Chunk | Summary]:
        name = str(request.prompt)
        if name in self._failures:
            raise self._failures[name]
        self.begun.append((name, follows))
        self.running.add(name)
        self.most_running = max(self.most_running, len(self.running))
        try:
            yield Chunk(id=1, index=0, text=name, tokens=(1,), logprobs=None, finish_reason="length")
            await asyncio.sleep(0)  # the others' turn
            await self.may_end.wait()
            yield Summary(2, 3, False, "", Timing(queue_seconds=0, first_token_seconds=0, tok_per_sec=None))
        finally:
            self.running.remove(name)

    def continue_all(self, names: str, at_once: int = 2) -> AsyncGenerator[Gain | Count]:
        requests = [_request(name) for name in names]
        return continue_all(cast(Generation, self), requests, at_once=at_once, in_chunks=True)


def test_all_are_continued_some_at_a_time_and_counted() -> None:
    async def run() -> tuple[Scripted, list[Any]]:
        scripted = Scripted()
        return scripted, [item async for item in scripted.continue_all("abcde")]

    scripted, (*gains, count) = asyncio.run(run())
    assert sorted((gain.prompt, gain.chunk.text) for gain in gains) == list(enumerate("abcde"))
    assert count == Count(prompt_tokens=10, completion_tokens=15)
    assert scripted.most_running == 2
    assert scripted.begun == [(name, name != "a") for name in "abcde"]
    assert not scripted.running


@pytest.mark.parametrize(
    ("failure", "loc"),
    [
        (TooManyRequests("generation_queue_full", "full"), None),
        (Unavailable("engine_restarted", "gone"), None),
        (Invalid("n_too_large", "n", errors=[{"loc": ["body", "n"], "msg": "m"}]), ["body", "n"]),
    ],
)
def test_what_refuses_the_first_prompt_lets_none_begin(failure: ServiceError, loc: Any) -> None:
    async def run() -> Scripted:
        scripted = Scripted({"a": failure})
        with pytest.raises(type(failure)) as raised:
            async for _ in scripted.continue_all("abc"):
                pass
        assert loc is None or raised.value.errors[0]["loc"] == loc
        return scripted

    assert asyncio.run(run()).begun == []


def test_what_fails_later_ends_all_and_names_the_prompt() -> None:
    failure = Invalid("token_unknown", "no such token", errors=[{"loc": ["body", "prompt", 4], "msg": "m"}])

    async def run() -> Scripted:
        scripted = Scripted({"d": failure})
        scripted.may_end.clear()
        items = scripted.continue_all("abdef")
        assert {cast(Gain, await anext(items)).chunk.text for _ in range(2)} == {"a", "b"}
        scripted.may_end.set()
        with pytest.raises(Invalid) as raised:
            await anext(items)
        assert raised.value.errors[0]["loc"] == ["body", "prompt", 2, 4]
        return scripted

    scripted = asyncio.run(run())
    assert not scripted.running
    assert {name for name, _ in scripted.begun} <= {"a", "b"}


def test_a_fault_of_ours_is_raised_and_not_waited_for() -> None:
    async def run() -> None:
        async for _ in Scripted({"b": RuntimeError("ours")}).continue_all("ab"):
            pass

    with pytest.raises(RuntimeError, match="ours"):
        asyncio.run(run())


def test_who_leaves_cancels_all() -> None:
    async def run() -> Scripted:
        scripted = Scripted()
        scripted.may_end.clear()
        items = scripted.continue_all("abc")
        await anext(items)
        assert scripted.running
        await items.aclose()
        return scripted

    assert not asyncio.run(run()).running
