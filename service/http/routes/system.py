"""The service itself: its workers, liveness, readiness and Prometheus metrics."""

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
    response_description="The workers, with their current jobs.",
    responses=problems(503),
)
def list_workers(service: Service) -> schemas.Listing[schemas.WorkerView]:
    """The workers, as they last reported themselves."""
    return schemas.Listing(data=[views.worker(row, running) for row, running in workers.list_workers(service.database)])


@router.get(
    "/healthz",
    summary="Check whether the process is alive",
    response_description="The process is alive.",
    responses=problems(),
)
async def get_health() -> schemas.Health:
    """Liveness check: the process answers."""
    return schemas.Health(version=nanomoe.__version__)


@router.get(
    "/readyz",
    summary="Check whether jobs can be submitted",
    response_description="Jobs can be submitted.",
    responses=problems(503),
)
def get_readiness(service: Service) -> schemas.Readiness:
    """Readiness check: the database is within reach, and at this code's schema revision."""
    service.database.check_revision()
    now = service.database.time()
    alive = [row for row, _ in workers.list_workers(service.database) if workers.is_alive(row, now)]
    return schemas.Readiness(database=service.database.engine.dialect.name, revision=REVISION, n_workers=len(alive))


@router.get(
    "/metrics",
    summary="Get metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "The metrics in the Prometheus text format.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problems(503),
    },
)
def get_prometheus_metrics(service: Service) -> Response:
    """Metrics in the Prometheus text format: jobs, queue, workers, training speed, generation."""
    return Response(generate_latest(service.generation.instruments.registry), media_type=CONTENT_TYPE_LATEST)
