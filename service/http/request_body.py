"""The encoding of a request's body, checked before any route reads it.

A body must not be compressed, and JSON must be UTF-8. A byte-order mark before JSON is dropped: some editors and
shells write one. Knows no route.
"""

import codecs
import email.message

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WITH_BODY = frozenset({"PATCH", "POST", "PUT"})
_UTF8 = frozenset({"utf-8", "utf8", "us-ascii"})


class RequestBody:
    """ASGI middleware that refuses a compressed body and JSON that is not UTF-8, once a route reads it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. `receive` raises `HTTPException` (415, 400) at a body that cannot be read."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_json, charset = _kind_of(headers.get("content-type", ""))
        codings = headers.get("content-encoding", "identity").strip().lower()
        is_first = True

        async def read() -> Message:
            nonlocal is_first
            message = await receive()
            if not is_first or not message.get("body"):
                return message
            is_first = False
            if codings != "identity":
                raise HTTPException(
                    415,
                    "the body has a Content-Encoding; send it uncompressed",
                    headers={"Accept-Encoding": "identity"},
                )
            if not is_json:
                return message
            if charset not in _UTF8:
                raise HTTPException(415, "the body is JSON in another charset than UTF-8")
            message = await _with_start(message, receive)
            body = message["body"].removeprefix(codecs.BOM_UTF8)
            # Python's parser would take the first for UTF-16 or UTF-32, and drop a second mark.
            if b"\0" in body[:4] or body.startswith(codecs.BOM_UTF8):
                raise HTTPException(400, "the body is not JSON in UTF-8")
            return {**message, "body": body}

        await self._app(scope, read, send)


def _kind_of(content_type: str) -> tuple[bool, str]:
    """Whether a media type is JSON, and its charset."""
    parsed = email.message.Message()
    parsed["content-type"] = content_type
    subtype = parsed.get_content_subtype()
    is_json = parsed.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
    return is_json, str(parsed.get_param("charset", "utf-8")).lower()


async def _with_start(message: Message, receive: Receive) -> Message:
    """`message` joined with those after it until its first bytes show the encoding, or the body ends."""
    while len(message["body"]) < 2 * len(codecs.BOM_UTF8) and message.get("more_body"):
        following = await receive()
        if following["type"] != "http.request":
            return {**following, "body": b""}
        message = {**following, "body": message["body"] + following.get("body", b"")}
    return message
