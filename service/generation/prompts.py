"""Several prompts of one request, generated at the same time as far as there is room, and answered as one.

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
    """The tokens of all prompts and of all continuations; the last item of a stream."""

    prompt_tokens: int
    completion_tokens: int


async def continue_all(
    generation: Generation, requests: Sequence[EngineRequest], *, at_once: int, in_chunks: bool
) -> AsyncGenerator[Gain | Count]:
    """What the continuations of all prompts gain, as it comes, and at the end the count. Closing the generator cancels
    all of them.

    The first prompt is admitted or refused as a request of its own; `at_once` of them are in the engine at a time, and
    each of the others is sent when one before it has ended, so that other clients' requests are served in between. One
    that fails ends all. `in_chunks` and the errors raised are those of `Generation.stream`; the location of an error
    has the prompt's number before its place in the prompt.
    """
    waiting = deque(enumerate(requests))
    items: asyncio.Queue[Gain | Summary | Exception] = asyncio.Queue()

    async def generate_next() -> None:
        while waiting:
            n, request = waiting.popleft()
            try:
                stream = generation.stream(request, in_chunks=in_chunks, follows=n > 0)
                async with aclosing(stream):
                    async for item in stream:
                        items.put_nowait(Gain(n, item) if isinstance(item, Chunk) else item)
            except Exception as error:  # raised where the items are read
                waiting.clear()
                items.put_nowait(_within_prompt(error, n))

    # They begin in this order: where the first prompt is refused, the tasks behind it find none left.
    tasks = [asyncio.create_task(generate_next()) for _ in range(min(at_once, len(requests)))]
    try:
        summaries: list[Summary] = []
        while len(summaries) < len(requests):
            item = await items.get()
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
    """The error, with the prompt's number in the location of its faults."""
    if not isinstance(error, Invalid):
        return error
    prompt = ["body", "prompt"]
    faults = [
        {**fault, "loc": [*prompt, n, *fault["loc"][2:]]} if fault["loc"][:2] == prompt else fault
        for fault in error.errors
    ]
    return Invalid(error.code, error.detail, errors=faults)
