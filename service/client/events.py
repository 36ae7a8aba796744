"""Parsers of the streams of events, with the position from which a broken connection resumes.

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

_KINDS: dict[str, type[BaseModel]] = {
    "status": schemas.StatusEvent,
    "step": schemas.Progress,
    "checkpoint": schemas.CheckpointMetrics,
    "warning": ConfigWarning,
}


@dataclass(frozen=True)
class JobEvent:
    """One event of a job, or of one of many jobs."""

    kind: str
    """Kind of the event: `status`, `step`, `checkpoint` or `warning`."""

    data: Any
    """Content of the event: a `StatusEvent`, `Progress`, `CheckpointMetrics` or `ConfigWarning`; among those of many
    jobs a `JobStatusEvent`, `JobStepEvent`, `JobCheckpointEvent` or `JobWarningEvent`, which name their job."""

    id: str | None
    """Id of the event, increasing within the stream; None for steps, which are not stored."""


_KINDS_OF_MANY: dict[str, type[BaseModel]] = {
    "status": schemas.JobStatusEvent,
    "step": schemas.JobStepEvent,
    "checkpoint": schemas.JobCheckpointEvent,
    "warning": schemas.JobWarningEvent,
}


class EventCursor:
    """Position in the stream of a job's events. Each connection begins with `call`; its bytes are given to `feed`."""

    _kinds = _KINDS

    def __init__(self, id_: str, last_event_id: str | None = None) -> None:
        self.id = id_
        self.last_event_id = last_event_id
        self.ended = False
        """Whether the job's last event has been received."""

        self._decoder = EventDecoder()

    def call(self) -> calls.Call[bytes]:
        """The request that resumes after the last event received."""
        self._decoder = EventDecoder()
        return self._call()

    def _call(self) -> calls.Call[bytes]:
        return calls.events(self.id, self.last_event_id)

    def opened(self, response: httpx.Response) -> None:
        """Handle the response's status: 204 means that no event follows."""
        self.ended = response.status_code == httpx.codes.NO_CONTENT

    def closed(self, response: httpx.Response) -> None:
        """Handle the end of the stream; raises if more events must follow, as when the service shuts down."""
        if not self.ended:
            raise httpx.RemoteProtocolError("the events ended too early", request=response.request)

    def feed(self, chunk: bytes) -> Iterator[JobEvent]:
        """The events that these bytes complete; those of kinds that this client does not know are skipped."""
        for sent in self._decoder.feed(chunk):
            self._note_position()
            if sent.event not in self._kinds:
                continue
            event = JobEvent(sent.event, _data(self._kinds[sent.event], sent), sent.id)
            self.ended = self._is_last(event)
            yield event
        self._note_position()

    def _note_position(self) -> None:
        self.last_event_id = self._decoder.last_id or self.last_event_id

    def _is_last(self, event: JobEvent) -> bool:
        return isinstance(event.data, schemas.StatusEvent) and event.data.status in TERMINAL


class SweepEventCursor(EventCursor):
    """Position in the stream of the events of a sweep's jobs. Only the service knows which is the last: the stream then
    ends, and opening it again is answered 204."""

    _kinds = _KINDS_OF_MANY

    def _call(self) -> calls.Call[bytes]:
        return calls.sweep_events(self.id, self.last_event_id)

    def closed(self, response: httpx.Response) -> None:
        """Handle the end of the stream: of a shutdown, too, the next connection tells."""

    def _is_last(self, event: JobEvent) -> bool:
        return False


class AllEventsCursor(EventCursor):
    """Position in the stream of the events of all jobs, which ends only with the service."""

    _kinds = _KINDS_OF_MANY

    def __init__(self, sweep: str | None, tag: str | None, last_event_id: str | None) -> None:
        super().__init__("", last_event_id)
        self._sweep = sweep
        self._tag = tag

    def _call(self) -> calls.Call[bytes]:
        return calls.all_events(self._sweep, self._tag, self.last_event_id)

    def _is_last(self, event: JobEvent) -> bool:
        return False


def _data(kind: type[BaseModel], sent: ServerSentEvent) -> BaseModel:
    try:
        return kind.model_validate_json(sent.data)
    except ValidationError as error:
        raise UnexpectedAnswer(f"a {sent.event} event that this version cannot read: {error}") from error
