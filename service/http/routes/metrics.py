"""The metrics of a job: the figures of each checkpoint, and the step series."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import Field

from service.http import schemas, views
from service.http.openapi import problems
from service.http.routes.parameters import JobId, Service, StrictQuery
from service.jobs import reads
from service.jobs.series import MIN_POINTS
from service.jobs.tables import SERIES

router = APIRouter(tags=["metrics"])

_CSV_ROWS = 10_000


class MetricsQuery(StrictQuery):
    """Query of `GET /jobs/{id}/metrics`."""

    points: int = Field(1000, ge=MIN_POINTS, le=100_000)
    """Most steps of the series; its extremes are kept."""

    from_step: int | None = Field(None, ge=1, le=2**62)
    """First step of the series; left out, the first of the job."""

    to_step: int | None = Field(None, ge=1, le=2**62)
    """Last step of the series; left out, the last of the job."""

    tokens: bool = True
    """Whether reconstructions list their tokens."""


@router.get(
    "/jobs/{job_id}/metrics",
    summary="Get a job's figures",
    response_description="The figures of each checkpoint, and the step series.",
    responses=problems(404, 409, 422, 503),
)
def get_job_metrics(service: Service, job_id: JobId, query: Annotated[MetricsQuery, Query()]) -> schemas.Metrics:
    """The figures of each checkpoint of a job, and its step series."""
    row = reads.get_job(service.database, job_id)
    checkpoints = reads.list_checkpoints(service.database, job_id)
    steps = reads.series(service.database, job_id, query.points, from_step=query.from_step, to_step=query.to_step)
    return views.metrics(row, checkpoints, steps, tokens=query.tokens)


@router.get(
    "/jobs/{job_id}/metrics.csv",
    summary="Get a job's step series as CSV",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The step series, a line for each step.",
            "content": {"text/csv": {"schema": {"type": "string"}}},
        },
        **problems(404, 409, 503),
    },
)
def get_job_metrics_csv(service: Service, job_id: JobId) -> StreamingResponse:
    """The complete step series of a job as CSV."""
    reads.get_job(service.database, job_id)
    return StreamingResponse(_csv(service, job_id), media_type="text/csv; charset=utf-8")


def _csv(service: Service, job_id: str) -> Iterator[str]:
    yield ",".join(("step", *SERIES)) + "\n"
    step = 0
    while rows := reads.steps_after(service.database, job_id, step, _CSV_ROWS):
        yield "".join(",".join("" if value is None else repr(value) for value in row) + "\n" for row in rows)
        step = rows[-1].step
