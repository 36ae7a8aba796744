"""The events of a job as a resumable stream of server-sent events."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import structlog
from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel

from nanomoe.config import ConfigWarning
from service.errors import ServiceError
from service.http import schemas, views
from service.http.context import Context
from service.http.openapi import problems
from service.http.patterns import SEQUENCE_NUMBER
from service.http.routes import event_stream
from service.http.routes.event_stream import EventStream
from service.http.routes.parameters import JobId, Service
from service.jobs import reads
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Event, Job

router = APIRouter(tags=["events"])

log = structlog.get_logger(__name__)

KEEPALIVE_SECONDS = 15.0
"""Time without an event after which a stream sends a comment: a proxy closes a connection that is idle, nginx after 60
seconds."""

LastEventId = Annotated[
    str | None,
    Header(
        pattern=SEQUENCE_NUMBER,
        description="The `id` of the last event that the client received: the stream resumes after it.",
    ),
]


class StreamEnded(Exception):
    """All has ended and the client has the last event: answered 204, upon which a browser does not reconnect."""


async def stream_ended(request: object, error: Exception) -> Response:
    """The answer to `StreamEnded`."""
    return Response(status_code=204)


async def _resume_after(service: Service, job_id: JobId, last_event_id: LastEventId = None) -> int:
    """The sequence number to resume after; determined before the stream begins, while an error can be answered."""
    seen = int(last_event_id or 0)
    row = await to_thread.run_sync(reads.get_job, service.database, job_id)
    if row.status in TERMINAL and seen >= row.event_seq:
        raise StreamEnded
    return seen


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job's events",
    response_class=Response,  # `EventStream` would be given a type
    responses={
        200: {
            "description": "The stream of the job's events.",
            "content": event_stream.documented(
                "Events `status` (a `StatusEvent`), `step` (a `Progress`), `checkpoint` (a `CheckpointMetrics` without "
                "tokens) and `warning` (a `ConfigWarning`); all but `step` carry an `id`."
            ),
        },
        204: {"description": "The job has ended, and the client has its last event."},
        **problems(404, 409, 422, 503),
    },
)
async def get_job_events(service: Service, job_id: JobId, after: Annotated[int, Depends(_resume_after)]) -> EventStream:
    """Stream status changes, steps, checkpoints and warnings of a job; ends after the terminal status."""
    return EventStream(_events(service, job_id, after))


async def _events(service: Context, job_id: str, after: int) -> AsyncIterator[bytes]:
    """The events after number `after`, and a comment where there have been none for `KEEPALIVE_SECONDS`."""
    seen, step = after, None
    clock = asyncio.get_running_loop().time
    last_sent_at = clock()
    while not service.wakeups.closed:
        change = service.wakeups.next()
        try:
            await service.authenticator.check_still_answered(service.database.caller)
            row, events = await to_thread.run_sync(_read, service, job_id, seen)
        except ServiceError as error:
            # The answer has begun, so it can only be ended. A client that reconnects gets the error.
            log.info("event_stream_aborted", job_id=job_id, reason=error.detail)
            return
        lines = [
            format_sse_event(event=kind, id=str(seq), data_str=data.model_dump_json()) for seq, kind, data in events
        ]
        seen = events[-1][0] if events else seen
        progress = views.progress(row)
        if row.status == "running" and progress.step != step:
            step = progress.step
            lines.append(format_sse_event(event="step", data_str=progress.model_dump_json()))
        if not lines and clock() - last_sent_at >= KEEPALIVE_SECONDS:
            lines.append(KEEPALIVE_COMMENT)
        for line in lines:
            yield line
            last_sent_at = clock()
        if row.status in TERMINAL and seen >= row.event_seq:
            return
        if not events:
            await service.wakeups.wait(change)


def _read(service: Context, job_id: str, seen: int) -> tuple[Job, list[tuple[int, str, BaseModel]]]:
    """The job, and its events after number `seen`.

    Events between the two queries are left for the next call: else the step of a job that has ended meanwhile would
    follow its last status.
    """
    row = reads.get_job(service.database, job_id)
    events = reads.events_after(service.database, job_id, seen)
    return row, [(event.seq, event.kind, _data(service, event)) for event in events if event.seq <= row.event_seq]


def _data(service: Context, event: Event) -> BaseModel:
    match event.kind:
        case "status":
            return schemas.StatusEvent.model_validate(event.data)
        case "checkpoint":
            row = reads.get_checkpoint(service.database, event.job_id, event.data["percent"])
            return views.checkpoint_metrics(row, tokens=False)
        case _:
            return ConfigWarning.model_validate(event.data)
