"""Cancels the work for a request whose client has disconnected: an answer that nobody reads is not computed."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from fastapi import Request, Response

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = Response(status_code=499)
"""The response to a client that has disconnected. Nobody receives it; 499 is what nginx logs in this case."""


async def disconnected_during_upload(request: Request, error: Exception) -> Response:
    """Handle `ClientDisconnect`: the client closed the connection before the request body was complete."""
    return CLIENT_CLOSED_REQUEST


async def cancel_on_disconnect(connection: Request, work: Coroutine[None, None, T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client disconnects before."""
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(connection))
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        disconnect.cancel()
        await asyncio.wait({working, disconnect})


async def _wait_for_disconnect(connection: Request) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass
