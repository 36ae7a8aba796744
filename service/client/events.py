"""A job's events, typed, and the place in its stream that survives a broken connection.

Knows no connection: `Client` and `AsyncClient` feed it bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from nanomoe.config import ConfigWarning
from service.client import calls
from service.client.errors import UnexpectedAnswer
from service.client.sse import EventDecoder, ServerSentEvent
from service.http import schemas
from service.jobs.statuses import TERMINAL

EventData = schemas.StatusEvent | schemas.Progress | schemas.CheckpointMetrics | ConfigWarning

_KINDS: dict[str, type[BaseModel]] = {
    "status": schemas.StatusEvent,
    "step": schemas.Progress,
    "checkpoint": schemas.CheckpointMetrics,
    "warning": ConfigWarning,
}


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job."""

    kind: str
    """`status`, `step`, `checkpoint` or `warning`."""

    data: Any
    """What the routes show of it: an `EventData`, by kind."""

    id: str | None
    """Increasing within a job; None for steps, which are not kept."""


class EventCursor:
    """Where the stream of a job's events was left. Each connection opens with `call`; its bytes are given to `feed`."""

    def __init__(self, job_id: str, last_event_id: str | None = None) -> None:
        self.job_id = job_id
        self.last_event_id = last_event_id
        self.ended = False
        """Whether the job's last event has been seen: nothing will follow."""

        self._decoder = EventDecoder()

    def call(self) -> calls.Call[bytes]:
        """The request that goes on after the last event seen."""
        self._decoder = EventDecoder()
        return calls.events(self.job_id, self.last_event_id)

    def opened(self, response: httpx.Response) -> None:
        """Take note of the answer's head: 204 says that nothing will follow."""
        self.ended = response.status_code == httpx.codes.NO_CONTENT

    def closed(self, response: httpx.Response) -> None:
        """Take note of the stream's end; raises when the job's own end was not in it, as when the service stops."""
        if not self.ended:
            raise httpx.RemoteProtocolError("the events ended before the job did", request=response.request)

    def feed(self, chunk: bytes) -> Iterator[JobEvent]:
        """The events that these bytes complete; those of a newer server that this client does not know are left out."""
        for sent in self._decoder.feed(chunk):
            if sent.id is not None:
                self.last_event_id = sent.id
            if sent.event not in _KINDS:
                continue
            event = JobEvent(sent.event, _data(sent), sent.id)
            if isinstance(event.data, schemas.StatusEvent) and event.data.status in TERMINAL:
                self.ended = True
            yield event


def _data(sent: ServerSentEvent) -> BaseModel:
    try:
        return _KINDS[sent.event].model_validate_json(sent.data)
    except ValidationError as error:
        raise UnexpectedAnswer(f"a {sent.event} event that this version cannot read: {error}") from error
