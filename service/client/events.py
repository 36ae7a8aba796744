"""Parser of a job's event stream, with the position from which a broken connection resumes.

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
    """One event of a job."""

    kind: str
    """Kind of the event: `status`, `step`, `checkpoint` or `warning`."""

    data: Any
    """Content of the event: the class of `EventData` for its kind."""

    id: str | None
    """Id of the event, increasing within a job; None for steps, which are not stored."""


class EventCursor:
    """Position in the stream of a job's events. Each connection begins with `call`; its bytes are given to `feed`."""

    def __init__(self, job_id: str, last_event_id: str | None = None) -> None:
        self.job_id = job_id
        self.last_event_id = last_event_id
        self.ended = False
        """Whether the job's last event has been received."""

        self._decoder = EventDecoder()

    def call(self) -> calls.Call[bytes]:
        """The request that resumes after the last event received."""
        self._decoder = EventDecoder()
        return calls.events(self.job_id, self.last_event_id)

    def opened(self, response: httpx.Response) -> None:
        """Handle the response's status: 204 means that no event follows."""
        self.ended = response.status_code == httpx.codes.NO_CONTENT

    def closed(self, response: httpx.Response) -> None:
        """Handle the end of the stream; raises if the job has not ended, as when the service shuts down."""
        if not self.ended:
            raise httpx.RemoteProtocolError("the events ended before the job did", request=response.request)

    def feed(self, chunk: bytes) -> Iterator[JobEvent]:
        """The events that these bytes complete; those of kinds that this client does not know are skipped."""
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
