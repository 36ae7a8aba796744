"""The events of many jobs, of a sweep or of all, as resumable streams of server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Annotated

import structlog
from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import StringConstraints

from nanomoe.config import JOB_ID_PATTERN
from service.errors import ServiceError
from service.http import views
from service.http.context import Context
from service.http.openapi import problems
from service.http.patterns import TAG
from service.http.routes import event_stream, events
from service.http.routes.event_stream import EventStream
from service.http.routes.events import LastEventId, StreamEnded
from service.http.routes.parameters import Service, StrictQuery, SweepId
from service.http.schemas.jobs import split_tag
from service.jobs import sweeps
from service.jobs.numbered_events import EventFilter, EventReader, JobProgress, NumberedEvent, last_number

router = APIRouter(tags=["events"])

log = structlog.get_logger(__name__)

GATHER_SECONDS = 0.05
"""Shortest time between two reads of a stream: many jobs commit often, and every commit wakes it."""

EXAMPLE = """id: 41

event: status
id: 42
data: {"status":"running","status_reason":null,"attempt":1,"error":null,"job_id":"0198c0de0a2b7c3d8e4f5061728394a5"}

event: step
data: {"step":12,"total_steps":500,"epoch":12,"percent":2.4,"job_id":"0198c0de0a2b7c3d8e4f5061728394a5"}

"""


class EventsQuery(StrictQuery):
    """Query of `GET /events`."""

    sweep: Annotated[str, StringConstraints(pattern=JOB_ID_PATTERN)] | None = None
    """Only events of the jobs of this sweep."""

    tag: Annotated[str, StringConstraints(pattern=TAG)] | None = None
    """Only events of jobs with this tag: `key`, or `key=value`, for which `key:value` does as well."""


async def _reader(
    service: Service, query: Annotated[EventsQuery, Query()], last_event_id: LastEventId = None
) -> EventReader:
    """A reader that has begun before the answer does: a client that then asks for the jobs misses nothing between."""
    wanted = EventFilter(sweep_id=query.sweep, tag=None if query.tag is None else split_tag(query.tag))
    await to_thread.run_sync(wanted.check, service.database)
    reader = EventReader(service.database, wanted, None if last_event_id is None else int(last_event_id))
    while not await to_thread.run_sync(reader.begin) and not service.wakeups.closed:
        await service.wakeups.wait(service.wakeups.next(), GATHER_SECONDS)
    return reader


@router.get(
    "/events",
    summary="Follow the events of all jobs",
    response_class=Response,
    responses={
        200: {
            "description": "The stream of the events of all jobs.",
            "content": event_stream.documented(
                "Events `status` (a `JobStatusEvent`), `step` (a `JobStepEvent`), `checkpoint` (a "
                "`JobCheckpointEvent`) and `warning` (a `JobWarningEvent`). All but `step` carry an `id`, which "
                "increases through all jobs; an `id` alone says how far the stream is.",
                EXAMPLE,
            ),
        },
        **problems(404, 422, 503),
    },
)
async def get_events(service: Service, reader: Annotated[EventReader, Depends(_reader)]) -> EventStream:
    """Stream status changes, steps, checkpoints and warnings of all jobs, or of those of a sweep or with a tag. Begins
    with the next event, or after `Last-Event-ID`, where 0 is before the first; ends only with the service."""

    def read() -> tuple[list[NumberedEvent], list[JobProgress], bool]:
        return *reader.read(), False

    return EventStream(_follow(service, reader, read, ("status", "checkpoint", "warning"), shows_position=True))


async def _sweep_reader(service: Service, sweep_id: SweepId, last_event_id: LastEventId = None) -> EventReader:
    seen = int(last_event_id or 0)
    ended = await to_thread.run_sync(sweeps.has_ended, service.database, sweep_id)
    if ended and seen >= await to_thread.run_sync(last_number, service.database, sweep_id):
        raise StreamEnded
    return EventReader(service.database, EventFilter(sweep_id=sweep_id), seen)


@router.get(
    "/sweeps/{sweep_id}/events",
    summary="Follow the events of a sweep's jobs",
    response_class=Response,
    responses={
        200: {
            "description": "The stream of the events of all jobs of the sweep.",
            "content": event_stream.documented(
                "Events `status` (a `JobStatusEvent`) and `checkpoint` (a `JobCheckpointEvent`), each with an `id` "
                "that increases through the whole sweep."
            ),
        },
        204: {"description": "All jobs have ended, and the client has the last event."},
        **problems(404, 422, 503),
    },
)
async def get_sweep_events(
    service: Service, sweep_id: SweepId, reader: Annotated[EventReader, Depends(_sweep_reader)]
) -> EventStream:
    """Stream status changes and checkpoints of all jobs of a sweep from the first; ends once all have ended."""

    def read() -> tuple[list[NumberedEvent], list[JobProgress], bool]:
        ended = sweeps.has_ended(service.database, sweep_id)  # before the events, which then are all
        found, _ = reader.read()
        return found, [], ended and not reader.has_more and not reader.is_behind

    return EventStream(_follow(service, reader, read, ("status", "checkpoint")))


async def _follow(
    service: Context,
    reader: EventReader,
    read: Callable[[], tuple[list[NumberedEvent], list[JobProgress], bool]],
    kinds: Collection[str],
    *,
    shows_position: bool = False,
) -> AsyncIterator[bytes]:
    """Events of these kinds until `read`, which returns events, progress and whether that was all, says so. Where there
    have been none for `events.KEEPALIVE_SECONDS`, a comment, or with `shows_position` the number that is read."""
    steps: dict[str, int] = {}
    clock = asyncio.get_running_loop().time
    last_sent_at = clock()
    if shows_position:
        yield _position(reader)
    while not service.wakeups.closed:
        change = service.wakeups.next()
        try:
            await service.authenticator.check_still_answered(service.database.caller)
            found, progress, is_all = await to_thread.run_sync(read)
        except ServiceError as error:
            # The answer has begun, so it can only be ended. A client that reconnects gets the error.
            log.info("event_stream_aborted", reason=error.detail)
            return
        lines = [_line(event) for event in found if event.kind in kinds]
        lines += _new_steps(progress, steps)
        if not lines and clock() - last_sent_at >= events.KEEPALIVE_SECONDS:
            lines.append(_position(reader) if shows_position else KEEPALIVE_COMMENT)
        for line in lines:
            yield line
            last_sent_at = clock()
        if is_all:
            return
        if reader.has_more:
            continue
        if reader.is_behind:
            await service.wakeups.wait(change, GATHER_SECONDS)
        else:
            await service.wakeups.wait(change)
            await asyncio.sleep(GATHER_SECONDS)


def _line(event: NumberedEvent) -> bytes:
    data = views.numbered_event(event).model_dump_json()
    return format_sse_event(event=event.kind, id=str(event.number), data_str=data)


def _position(reader: EventReader) -> bytes:
    return b"id: %d\n\n" % (reader.position or 0)


def _new_steps(progress: list[JobProgress], steps: dict[str, int]) -> Iterator[bytes]:
    """A `step` event of each running job that is not where it was; `steps` remembers where each is."""
    before = dict(steps)
    steps.clear()
    for job in progress:
        event = views.job_step(job)
        steps[job.job_id] = event.step
        if before.get(job.job_id) != event.step:
            yield format_sse_event(event="step", data_str=event.model_dump_json())
