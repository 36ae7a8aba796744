"""A client that goes away takes its work with it: what nobody will read is not computed, and is no fault of ours."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from fastapi import Request, Response

T = TypeVar("T")

CLIENT_IS_GONE = Response(status_code=499)
"""Nobody reads it; the number is what web servers write into their logs."""


async def left_while_sending(request: Request, error: Exception) -> Response:
    """The answer to a request whose body never came to its end."""
    return CLIENT_IS_GONE


async def unless_gone(connection: Request, work: Coroutine[None, None, T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client goes away before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(connection))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _gone(connection: Request) -> None:
    """Return when the client has closed the connection."""
    while (await connection.receive())["type"] != "http.disconnect":
        pass
