"""Sweeps: submit many jobs as one, list and read them, cancel, pause, resume, delete."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Body, Query, Response
from pydantic import Field, StringConstraints

from service.errors import Invalid
from service.http import files, schemas, views
from service.http.openapi import problems, ref
from service.http.parent import find_parent
from service.http.patterns import SEQUENCE_NUMBER
from service.http.routes.parameters import CertainSweepId, IdempotencyKey, Service, StrictQuery, SweepId
from service.http.schemas import SweepRequest, SweepView
from service.http.sweep_points import Fault, Point, parameters_of, points_of, refuse_points
from service.jobs import queue, submit, sweeps
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.pace import measure_pace
from service.jobs.submission import Assessment, Assessor

router = APIRouter(tags=["sweeps"])

MAX_NAME = 200
"""Most characters of a job's name."""

EXAMPLES = {
    "grid": {
        "summary": "A grid, three seeds each",
        "value": {
            "text": "Era uma vez um gato.",
            "name": "learning rate",
            "grid": {"lr": [1e-4, 5e-3], "n_embd": [64, 128]},
            "seeds": 3,
        },
    },
    "points": {
        "summary": "Any combinations",
        "value": {
            "text": "Era uma vez um gato.",
            "config": {"epochs": 100},
            "points": [{"dropout": 0}, {"dropout": 0.2, "lr": 0.005}],
        },
    },
}


DRY_RUN = schemas.SweepEstimate(
    n_jobs=12,
    parameters=[
        schemas.SweepParameter(name="lr", values=[1e-4, 5e-3]),
        schemas.SweepParameter(name="n_embd", values=[64, 128]),
        schemas.SweepParameter(name="seed", values=[42, 43, 44]),
    ],
    shapes=[
        schemas.SweepShape(
            n_jobs=6,
            n_params=n_params,
            n_active_params=n_params,
            training_bytes=training_bytes,
            total_steps=500,
            together=4,
        )
        for n_params, training_bytes in ((730_000, 27_000_000), (1_854_720, 68_000_000))
    ],
    training_bytes=68_000_000,
    total_steps=6_000,
    cohorts=[schemas.SweepCohorts(n_jobs=4, n_cohorts=2), schemas.SweepCohorts(n_jobs=2, n_cohorts=2)],
    predicted_seconds=None,
    predicted_alone_seconds=96.0,
    warnings=[],
)
"""Example of what a dry run answers: cohorts of four, as no job has been trained in company yet."""


class SubmitSweepQuery(StrictQuery):
    """Query of `POST /sweeps`."""

    dry_run: bool = False
    """Validate and measure the jobs without submitting them."""


class ListSweepsQuery(StrictQuery):
    """Query of `GET /sweeps`."""

    limit: int = Field(50, ge=1, le=200)
    """Most sweeps of a page."""

    cursor: Annotated[str, StringConstraints(pattern=SEQUENCE_NUMBER)] | None = None
    """Value of `next_cursor` in the previous page."""


@router.post(
    "/sweeps",
    summary="Submit a sweep",
    response_description="The sweep that was submitted.",
    status_code=201,
    response_model=SweepView,
    responses={
        200: {
            "description": "The sweep that was submitted with this key before; or the estimate of a dry run.",
            "content": {
                "application/json": {
                    "schema": {"anyOf": [ref(SweepView), ref(schemas.SweepEstimate)]},
                    "examples": {"dry run": {"summary": "A dry run", "value": DRY_RUN.model_dump(mode="json")}},
                }
            },
        },
        **problems(400, 404, 409, 413, 415, 422, 429, 503, 507),
    },
)
def submit_sweep(
    service: Service,
    request: Annotated[SweepRequest, Body(openapi_examples=EXAMPLES)],
    query: Annotated[SubmitSweepQuery, Query()],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Response | SweepView:
    """Train many models that differ in a few knobs, at most 1,000, created together or not at all."""
    points = points_of(request)
    parameters = parameters_of(points)
    assessed = _assess(service, points)
    if query.dry_run:
        sizes = [found for point, found in zip(points, assessed, strict=True) for _ in point.seeds]
        estimate = views.sweep_estimate(sizes, parameters, measure_pace(service.database))
        return Response(estimate.model_dump_json(), 200, media_type="application/json")
    new = NewSweep(
        jobs=_jobs(request, points, assessed),
        config=request.config,
        parameters=parameters,
        name=request.name,
        tags=request.tags,
        idempotency_key=idempotency_key,
    )
    _refuse_more_than_may_wait(new.jobs, service.settings.max_queued)
    row, created = submit.submit_sweep(service.database, new, max_queued=service.settings.max_queued)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/sweeps/{row.id}"
    return _read(service, row.id)


def _assess(service: Service, points: Sequence[Point]) -> list[Assessment]:
    """What the jobs of each point will need. Raises Invalid `invalid_points`, which names every point that is
    refused."""
    # A parent is no knob that varies: it is that of all.
    assessor = Assessor(service.settings, find_parent(service, points[0].config.init_from))
    found, faults = [], list[Fault]()
    for point in points:
        try:
            found.append(assessor.assess(point.text, point.config))
        except Invalid as error:
            faults.append(point.fault(f"{error.code}: {error.detail}"))
    refuse_points(faults, len(points))
    return found


def _jobs(request: SweepRequest, points: Sequence[Point], assessed: Sequence[Assessment]) -> list[NewJob]:
    jobs = []
    for point, found in zip(points, assessed, strict=True):
        like = found.new_job(tags=request.tags)
        for label, config in point.jobs():
            name = ": ".join(filter(None, (request.name, label)))[:MAX_NAME] or None
            jobs.append(replace(like, name=name, config={**like.config, "seed": config.seed}))
    return jobs


def _refuse_more_than_may_wait(jobs: Sequence[NewJob], max_queued: int) -> None:
    if len(jobs) > max_queued:
        detail = f"the sweep has {len(jobs):,} jobs, of which this server lets {max_queued:,} wait at once"
        raise Invalid("sweep_too_large", detail, errors=[{"loc": ["body"], "msg": detail}])


def _read(service: Service, sweep_id: str) -> SweepView:
    return views.sweep(*sweeps.get_sweep(service.database, sweep_id))


@router.get(
    "/sweeps",
    summary="List sweeps",
    response_description="A page of sweeps.",
    responses=problems(422, 503),
)
def list_sweeps(service: Service, query: Annotated[ListSweepsQuery, Query()]) -> schemas.Page[SweepView]:
    """The sweeps, newest first, without the ids and the progress of their jobs."""
    before = None if query.cursor is None else int(query.cursor)
    rows = sweeps.list_sweeps(service.database, before=before, limit=query.limit + 1)
    return views.sweep_page(rows, query.limit)


@router.get(
    "/sweeps/{sweep_id}",
    summary="Get a sweep",
    response_description="The sweep as it is now.",
    responses=problems(404, 409, 503),
)
def get_sweep(service: Service, sweep_id: SweepId) -> SweepView:
    """A sweep: what varies, its jobs, how many have which status, and how far they are."""
    return _read(service, sweep_id)


@router.post(
    "/sweeps/{sweep_id}/cancel",
    summary="Cancel a sweep",
    response_description="The sweep, whose jobs will stop or have stopped.",
    status_code=202,
    responses=problems(404, 409, 503, 507),
)
def cancel_sweep(service: Service, sweep_id: CertainSweepId) -> SweepView:
    """Request that every job of the sweep stops for good. Their checkpoints stay."""
    queue.request_cancel_sweep(service.database, sweep_id)
    return _read(service, sweep_id)


@router.post(
    "/sweeps/{sweep_id}/pause",
    summary="Pause a sweep",
    response_description="The sweep, whose jobs will pause or have paused.",
    status_code=202,
    responses=problems(404, 409, 503, 507),
)
def pause_sweep(service: Service, sweep_id: SweepId) -> SweepView:
    """Request that every job of the sweep stops until it is resumed."""
    queue.request_pause_sweep(service.database, sweep_id)
    return _read(service, sweep_id)


@router.post(
    "/sweeps/{sweep_id}/resume",
    summary="Resume a paused sweep",
    response_description="The sweep, whose jobs wait for a worker again.",
    status_code=202,
    responses=problems(404, 409, 503, 507),
)
def resume_sweep(service: Service, sweep_id: SweepId) -> SweepView:
    """Put the paused jobs of the sweep back into the queue, to continue where they stopped."""
    queue.resume_sweep(service.database, sweep_id)
    return _read(service, sweep_id)


@router.delete(
    "/sweeps/{sweep_id}",
    summary="Delete a finished sweep",
    response_description="The sweep is deleted.",
    status_code=204,
    responses=problems(404, 409, 503, 507),
)
def delete_sweep(service: Service, sweep_id: CertainSweepId) -> None:
    """Delete a sweep all of whose jobs have ended, with its jobs, their files, and texts that no other job has."""
    deleted = queue.delete_sweep(service.database, sweep_id)
    files.remove_jobs(deleted, service.store, service.settings.data_dir)
