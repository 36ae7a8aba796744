"""The service itself: its workers, whether it lives, whether it can serve."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import nanomoe
from service.database.schema import REVISION
from service.http import schemas, views
from service.http.openapi import problems
from service.http.routes.parameters import Service
from service.jobs import workers

router = APIRouter(tags=["service"])


@router.get(
    "/workers",
    summary="List the workers",
    response_description="The workers.",
    responses=problems(503),
)
def list_workers(service: Service) -> schemas.Listing[schemas.WorkerView]:
    """The workers, as they last reported themselves."""
    return schemas.Listing(data=[views.worker(row, running) for row, running in workers.list_workers(service.database)])


@router.get(
    "/healthz",
    summary="Tell whether the process lives",
    response_description="The process lives.",
    responses=problems(),
)
async def get_health() -> schemas.Health:
    """Whether the process answers at all."""
    return schemas.Health(version=nanomoe.__version__)


@router.get(
    "/readyz",
    summary="Tell whether jobs can be submitted",
    response_description="Jobs can be submitted.",
    responses=problems(503),
)
def get_readiness(service: Service) -> schemas.Readiness:
    """Whether jobs can be submitted: the database is within reach, and at this code's revision."""
    service.database.check_revision()
    now = service.database.time()
    alive = [row for row, _ in workers.list_workers(service.database) if workers.is_alive(row, now)]
    return schemas.Readiness(database=service.database.engine.dialect.name, revision=REVISION, n_workers=len(alive))


@router.get(
    "/metrics",
    summary="Get metrics for Prometheus",
    response_class=Response,
    responses={
        200: {"description": "The metrics as text.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(503),
    },
)
def get_prometheus_metrics(service: Service) -> Response:
    """What a Prometheus server scrapes: jobs, queue, workers, training speed, generation."""
    return Response(generate_latest(service.generation.instruments.registry), media_type=CONTENT_TYPE_LATEST)
