"""Jobs: submit, list, read, rename, cancel, pause, resume, delete."""

import asyncio
from dataclasses import replace
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Response
from pydantic import Field, StringConstraints

from service.errors import DatabaseUnavailable
from service.http import files, schemas, views
from service.http.conditional import ConditionalResponse
from service.http.context import Context
from service.http.openapi import NOT_MODIFIED, problems, ref
from service.http.parent import find_parent
from service.http.patterns import ID_PREFIX, PRINTABLE, SEQUENCE_NUMBER, TAG
from service.http.routes.parameters import CertainJobId, IdempotencyKey, JobId, Service, StrictQuery
from service.http.routes.submit_body import DOCUMENTED, Submission
from service.http.schemas import JobView
from service.http.schemas.jobs import split_tag
from service.jobs import queue, queue_position, quotas, reads, submission, submit
from service.jobs.labels import relabel
from service.jobs.pace import measure_pace
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Job

router = APIRouter(tags=["jobs"])

MAX_WAIT_SECONDS = 120

RETRY_SECONDS = 1.0
"""Delay between two reads of a waiting request while the database is out of reach."""


class SubmitQuery(StrictQuery):
    """Query of `POST /jobs`."""

    dry_run: bool = False
    """Validate and measure the job without submitting it."""


class ListQuery(StrictQuery):
    """Query of `GET /jobs`."""

    status: schemas.Status | None = None
    """Only jobs with this status."""

    tag: Annotated[str, StringConstraints(pattern=TAG)] | None = None
    """Only jobs with this tag: `key`, or `key=value`, for which `key:value` does as well."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PRINTABLE)] | None = None
    """Only jobs of exactly this name."""

    id_prefix: Annotated[str, StringConstraints(pattern=ID_PREFIX)] | None = None
    """Only jobs whose id begins with these digits."""
    q: Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=200)] | None = None
    """Only jobs with this in their name, in upper or lower case, or at the beginning of their id or their sweep's."""

    limit: int = Field(50, ge=1, le=200)
    """Most jobs of a page."""

    cursor: Annotated[str, StringConstraints(pattern=SEQUENCE_NUMBER)] | None = None
    """Value of `next_cursor` in the previous page."""

    counts: bool = False
    """Whether to count the jobs of each status, among those with this `tag` and `q`."""


class JobQuery(StrictQuery):
    """Query of `GET /jobs/{id}`."""

    wait: float = Field(0, ge=0, le=MAX_WAIT_SECONDS, allow_inf_nan=False)
    """Seconds to wait for another status than `seen`."""

    seen: schemas.Status | None = None
    """The status that the client has already; without it, any change of the status ends the wait."""


@router.post(
    "/jobs",
    summary="Submit a job",
    response_description="The job that was submitted.",
    status_code=201,
    response_model=JobView,
    responses={
        200: {
            "description": "The job that was submitted with this key before; or the estimate of a dry run.",
            "content": {"application/json": {"schema": {"anyOf": [ref(JobView), ref(schemas.Estimate)]}}},
        },
        **problems(400, 404, 409, 413, 415, 422, 429, 503, 507),
    },
    openapi_extra=DOCUMENTED,
)
def submit_job(
    service: Service,
    request: Submission,
    query: Annotated[SubmitQuery, Query()],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Response | JobView:
    """Train a model on a text. Everything but the text has the reference run's default."""
    found = submission.assess(
        request.text, request.config, service.settings, find_parent(service, request.config.init_from)
    )
    if query.dry_run:
        estimate = views.estimate(found, measure_pace(service.database))
        return Response(estimate.model_dump_json(), 200, media_type="application/json")
    new = found.new_job(
        name=request.name,
        tags=request.tags,
        priority=request.priority,
        run_at=request.run_at,
        idempotency_key=idempotency_key,
    )
    row, created = submit.submit_job(service.database, new, max_queued=service.settings.max_queued)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/jobs/{row.id}"
    return _with_queue_position(service, row)


@router.get(
    "/jobs",
    summary="List jobs",
    response_description="A page of jobs.",
    responses=problems(422, 503),
)
def list_jobs(service: Service, query: Annotated[ListQuery, Query()]) -> schemas.JobPage:
    """The jobs, newest first. Jobs that arrive meanwhile do not shift the pages."""
    tag = None if query.tag is None else split_tag(query.tag)
    before = None if query.cursor is None else int(query.cursor)
    wanted = reads.JobFilter(name=query.name, id_prefix=query.id_prefix, tag=tag, q=query.q)
    rows = reads.list_measured_jobs(
        service.database, replace(wanted, status=query.status), before=before, limit=query.limit + 1
    )
    counts = reads.count_jobs(service.database, wanted) if query.counts else None
    reasons = quotas.find_waiting_reasons(service.database, [row for row, _ in rows])
    return views.job_page(rows, query.limit, counts, reasons)


@router.get(
    "/jobs/{job_id}",
    summary="Get a job, or wait for its status",
    response_description="The job as it is now.",
    responses=problems(404, 409, 422, 503),
)
async def get_job(service: Service, job_id: JobId, query: Annotated[JobQuery, Query()]) -> JobView:
    """One job. With `wait`, answers once its status differs from `seen` or is terminal, or after that time.

    While the database is out of reach, the request waits as long.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + query.wait
    seen = query.seen

    def is_over() -> bool:
        return clock() >= deadline or service.wakeups.closed

    while True:
        change = service.wakeups.next()
        try:
            row, figures = await to_thread.run_sync(reads.get_measured_job, service.database, job_id)
            seen = seen or row.status
            if row.status != seen or row.status in TERMINAL or is_over():
                # Only now: a queue position takes a query over the whole queue.
                view = await to_thread.run_sync(_with_queue_position, service, row)
                return views.with_figures(view, figures)
            pause = deadline - clock()
        except DatabaseUnavailable:
            if is_over():
                raise
            pause = min(deadline - clock(), RETRY_SECONDS)
        await service.wakeups.wait(change, pause)


def _with_queue_position(service: Context, row: Job) -> JobView:
    """The job with its queue position, and why it waits."""
    place = queue_position.find_queue_position(service.database, row.id) if row.status == "queued" else None
    if place is None:
        return views.job(row)
    return views.job(
        row,
        queue_position=place.position,
        estimated_start_at=place.estimated_start_at,
        waiting_reason=quotas.find_waiting_reasons(service.database, [row]).get(row.id),
    )


@router.patch(
    "/jobs/{job_id}",
    summary="Rename or retag a job",
    response_description="The changed job.",
    responses=problems(400, 404, 409, 413, 415, 422, 503, 507),
)
def patch_job(service: Service, job_id: JobId, patch: schemas.JobPatch) -> JobView:
    """Change the name or the tags of a job."""
    return views.job(relabel(service.database, job_id, patch.model_dump(exclude_unset=True)))


@router.get(
    "/jobs/{job_id}/text",
    summary="Get a job's training text",
    response_class=Response,
    responses={
        200: {
            "description": "The training text of the job.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        304: NOT_MODIFIED,
        **problems(404, 409, 412, 503),
    },
)
def get_job_text(service: Service, job_id: JobId) -> Response:
    """The training text of a job, in UTF-8."""
    row = reads.get_job(service.database, job_id)
    return ConditionalResponse(
        reads.get_text(service.database, row.text_sha256),
        headers={"ETag": f'"{row.text_sha256}"', "Cache-Control": "no-cache"},
        media_type="text/plain; charset=utf-8",
    )


@router.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    response_description="The job, which will stop or has stopped.",
    status_code=202,
    responses=problems(404, 409, 503, 507),
)
def cancel_job(service: Service, job_id: CertainJobId) -> JobView:
    """Request that the job stops for good. Its checkpoints stay."""
    return views.job(queue.request_cancel(service.database, job_id))


@router.post(
    "/jobs/{job_id}/pause",
    summary="Pause a job",
    response_description="The job, which will pause or has paused.",
    status_code=202,
    responses=problems(404, 409, 503, 507),
)
def pause_job(service: Service, job_id: JobId) -> JobView:
    """Request that the job stops until it is resumed."""
    return views.job(queue.request_pause(service.database, job_id))


@router.post(
    "/jobs/{job_id}/resume",
    summary="Resume a paused job",
    response_description="The job, which waits for a worker again.",
    status_code=202,
    responses=problems(404, 409, 503, 507),
)
def resume_job(service: Service, job_id: JobId) -> JobView:
    """Put a paused job back into the queue, to continue where it stopped."""
    return views.job(queue.resume(service.database, job_id))


@router.delete(
    "/jobs/{job_id}",
    summary="Delete a finished job",
    response_description="The job is deleted.",
    status_code=204,
    responses=problems(404, 409, 503, 507),
)
def delete_job(service: Service, job_id: CertainJobId) -> None:
    """Delete a finished job, its files, and its text if no other job has it."""
    queue.delete(service.database, job_id)
    files.remove_jobs([job_id], service.store, service.settings.data_dir)
