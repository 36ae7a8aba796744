"""`HEAD` for every `GET` route: the same status and headers, and no content (RFC 9110, 9.3.2). Knows no route."""

from anyio import CancelScope
from starlette.types import ASGIApp, Message, Receive, Scope, Send

IS_HEAD = "nanomoe.is_head"
"""Key in the scope of a request that is handled as `GET`, for the few that answer `HEAD` otherwise."""

# Ranges are defined for GET alone (RFC 9110, 14.2).
_ONLY_FOR_GET = frozenset({b"range", b"if-range"})


class HeadAsGet:
    """ASGI middleware that handles `HEAD` as `GET`, and stops before the content."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. A `HEAD` is cancelled where the content would begin, so that no stream or file is read."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in _ONLY_FOR_GET]
        with CancelScope() as scope_of_answer:

            async def send_head(message: Message) -> None:
                if message["type"] == "http.response.start":
                    await send(message)
                    await send({"type": "http.response.body", "body": b""})
                    scope_of_answer.cancel()

            await self._app({**scope, "method": "GET", "headers": headers, IS_HEAD: True}, receive, send_head)
