"""Incremental parser of server-sent events, as specified by WHATWG.

Knows no job and no connection. `httpx`'s own line iterator is not used: it also splits at U+2028 and similar
characters, which JSON holds unescaped.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class ServerSentEvent:
    """One dispatched event."""

    event: str
    data: str
    id: str | None
    """Id of this event; None when it has none."""


class EventDecoder:
    """Parses a stream's bytes as they come; an event is returned once its closing blank line is read."""

    def __init__(self) -> None:
        self._rest = b""
        self._event = ""
        self._data: list[str] = []
        self._id: str | None = None
        self.last_id: str | None = None
        """The newest id that was received, with an event or alone."""

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """The events that `chunk` completes."""
        buffer = self._rest + chunk
        # A carriage return at the very end may be half of a pair: it waits for the next chunk.
        held = b"\r" if buffer.endswith(b"\r") else b""
        *lines, rest = _LINE_END.split(buffer[: len(buffer) - len(held)])
        self._rest = rest + held
        for line in lines:
            event = self._line(line.decode(errors="replace"))
            if event is not None:
                yield event

    def _line(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "id":
                self._id = value
        return None  # a comment (a ping), or a field that is not used

    def _dispatch(self) -> ServerSentEvent | None:
        self.last_id = self.last_id if self._id is None else self._id
        event = ServerSentEvent(self._event or "message", "\n".join(self._data), self._id) if self._data else None
        self._event, self._data, self._id = "", [], None
        return event
