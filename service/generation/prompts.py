"""Several prompts of one request, generated at the same time as far as there is room, and answered as one.

Knows no HTTP and no engine process.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from service.errors import Invalid
from service.generation.admission import Generation, Summary
from service.generation.merged import merged
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
    n_prompt_tokens = n_completion_tokens = 0

    async def stream(n: int) -> AsyncGenerator[Chunk | Summary]:
        try:
            async with aclosing(generation.stream(requests[n], in_chunks=in_chunks, follows=n > 0)) as items:
                async for item in items:
                    yield item
        except Invalid as error:
            raise _within_prompt(error, n) from error

    async with aclosing(merged([partial(stream, n) for n in range(len(requests))], at_once=at_once)) as items:
        async for n, item in items:
            if isinstance(item, Chunk):
                yield Gain(n, item)
            else:
                n_prompt_tokens += item.prompt_tokens
                n_completion_tokens += item.completion_tokens
    yield Count(n_prompt_tokens, n_completion_tokens)


def _within_prompt(error: Invalid, n: int) -> Invalid:
    """The error, with the prompt's number in the location of its faults."""
    prompt = ["body", "prompt"]
    faults = [
        {**fault, "loc": [*prompt, n, *fault["loc"][2:]]} if fault["loc"][:2] == prompt else fault
        for fault in error.errors
    ]
    return Invalid(error.code, error.detail, errors=faults)
