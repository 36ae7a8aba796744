"""Several prompts of one request: continued side by side, as many as there are places for, and answered as one.

Knows no HTTP and no engine process.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from service.errors import Invalid
from service.generation.admission import Generation, Summary
from service.generation.messages import Chunk, EngineRequest


@dataclass(frozen=True)
class Gain:
    """What one continuation of one prompt has gained."""

    prompt: int
    """The prompt's place, from 0."""

    chunk: Chunk


@dataclass(frozen=True)
class Count:
    """The tokens of all prompts and of all continuations; the last of what is told of a request."""

    prompt_tokens: int
    completion_tokens: int


async def continue_all(
    generation: Generation, requests: Sequence[EngineRequest], *, at_once: int, in_chunks: bool
) -> AsyncGenerator[Gain | Count]:
    """What the continuations of all prompts gain, as it comes; at last the count. Closing the generator cancels all.

    The first is admitted or turned away as a request of its own; `at_once` of them are in the engine at a time, and
    each of the others asks for a place when one before it has ended: between them, others are served. One that fails
    ends all. `in_chunks` and what is raised are as for `Generation.stream`; the place of a faulty prompt goes before
    what lies inside of it.
    """
    waiting = deque(enumerate(requests))
    told: asyncio.Queue[Gain | Summary | Exception] = asyncio.Queue()

    async def take_turns() -> None:
        while waiting:
            n, request = waiting.popleft()
            try:
                async with aclosing(generation.stream(request, in_chunks=in_chunks, follows=n > 0)) as items:
                    async for item in items:
                        told.put_nowait(Gain(n, item) if isinstance(item, Chunk) else item)
            except Exception as error:  # whoever asked shall have it
                waiting.clear()
                told.put_nowait(_within_prompt(error, n))

    # They begin in this order: what is refused before it reaches the engine leaves nothing to the next.
    tasks = [asyncio.create_task(take_turns()) for _ in range(min(at_once, len(requests)))]
    try:
        summaries: list[Summary] = []
        while len(summaries) < len(requests):
            item = await told.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Summary):
                summaries.append(item)
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    yield Count(
        prompt_tokens=sum(summary.prompt_tokens for summary in summaries),
        completion_tokens=sum(summary.completion_tokens for summary in summaries),
    )


def _within_prompt(error: Exception, n: int) -> Exception:
    """The error, with the prompt's place in where its faults lie."""
    if not isinstance(error, Invalid):
        return error
    prompt = ["body", "prompt"]
    faults = [
        {**fault, "loc": [*prompt, n, *fault["loc"][2:]]} if fault["loc"][:2] == prompt else fault
        for fault in error.errors
    ]
    return Invalid(error.code, error.detail, errors=faults)
