"""Several streams of one request as one: some of them at a time, their items as they come.

Knows no HTTP and no engine process.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[Callable[[], AsyncGenerator[T]]], *, at_once: int) -> AsyncGenerator[tuple[int, T]]:
    """The items of all streams, each with the number of its stream. Closing the generator closes all of them.

    The first `at_once` streams are opened together, in order, and each of the others when one before it has ended. The
    exception of any stream ends all of them and is raised; where the first raises before it waits for anything, no
    other is opened.
    """
    waiting = deque(enumerate(streams))
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def read_next() -> None:
        while waiting:
            n, opened = waiting.popleft()
            try:
                async with aclosing(opened()) as stream:
                    async for item in stream:
                        items.put_nowait((n, item))
                items.put_nowait(None)
            except Exception as error:  # raised where the items are read
                waiting.clear()
                items.put_nowait(error)

    # They begin in this order: where the first stream raises, the tasks behind it find none left.
    tasks = [asyncio.create_task(read_next()) for _ in range(min(at_once, len(streams)))]
    n_open = len(streams)
    try:
        while n_open:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                n_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
