"""Server-sent events as an HTTP response: headers and documentation of every stream."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse

MEDIA_TYPE = "text/event-stream"

_HEADERS = {
    "Cache-Control": "no-cache",
    # nginx buffers a response unless this header disables it.
    "X-Accel-Buffering": "no",
}


class EventStream(StreamingResponse):
    """A stream of server-sent events that reaches the client event by event, through a proxy too."""

    media_type = MEDIA_TYPE

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str] | None = None) -> None:
        """`events`: the encoded events. `headers`: response headers beside those of every stream."""
        super().__init__(events, headers={**_HEADERS, **(headers or {})})


def documented(description: str, example: str | None = None) -> dict[str, Any]:
    """The `content` of a streamed response in the OpenAPI document, described in words.

    OpenAPI 3.1 cannot say what type the items of a stream have. Some readers take a `schema` for that of the whole
    text and some for that of each event, so it names no type.
    """
    given = {} if example is None else {"example": example}
    return {MEDIA_TYPE: {"schema": {"description": description}, **given}}
