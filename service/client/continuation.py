"""Parser of a generation's event stream. Knows no connection: the clients feed it bytes."""

from collections.abc import Iterator

import httpx
from pydantic import ValidationError

from service.client.errors import UnexpectedAnswer, exception_of
from service.client.sse import EventDecoder, ServerSentEvent
from service.http import schemas

Piece = schemas.GenerateChunk | schemas.GenerateEnd
"""An event of the stream: a chunk of a continuation, or the end with usage and timing."""


class ContinuationReader:
    """One stream, from its first byte to its `[DONE]`."""

    def __init__(self) -> None:
        self.begun = False
        """Whether an event has been returned: from then on the request must not be repeated."""

        self._done = False
        self._decoder = EventDecoder()

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """The events that these bytes complete; raises the `Problem` that ended the generation."""
        for sent in self._decoder.feed(chunk):
            self.begun = True
            if sent.data == "[DONE]":
                self._done = True
            else:
                yield _piece(sent)

    def finish(self, response: httpx.Response) -> None:
        """Raise if the stream ended before the generation did."""
        if not self._done:
            raise httpx.RemoteProtocolError("the continuation ended early", request=response.request)


def _piece(sent: ServerSentEvent) -> Piece:
    try:
        match sent.event:
            case "chunk":
                return schemas.GenerateChunk.model_validate_json(sent.data)
            case "end":
                return schemas.GenerateEnd.model_validate_json(sent.data)
            case "error":
                problem = schemas.Problem.model_validate_json(sent.data)
            case _:
                raise UnexpectedAnswer(f"a {sent.event} event in a continuation: another version of the service")
    except ValidationError as error:
        raise UnexpectedAnswer(f"a {sent.event} event that this version cannot read: {error}") from error
    raise exception_of(problem)
