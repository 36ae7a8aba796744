"""The service itself: its workers, whether it lives, whether it can serve."""

from datetime import timedelta

from fastapi import APIRouter

import nanomoe
from service import schemas, store, views
from service.openapi import problems
from service.routes.parameters import Service

router = APIRouter(tags=["service"])

_LATELY = timedelta(minutes=2)


@router.get("/workers", responses=problems(503))
def list_workers(service: Service) -> schemas.Listing[schemas.WorkerView]:
    """The workers, as they last reported themselves."""
    return schemas.Listing(data=[views.worker(row, running) for row, running in store.list_workers(service.database)])


@router.get("/healthz", responses=problems())
async def get_health() -> schemas.Health:
    """Whether the process answers at all."""
    return schemas.Health(version=nanomoe.__version__)


@router.get("/readyz", responses=problems(503))
def get_readiness(service: Service) -> schemas.Readiness:
    """Whether jobs can be submitted: the database is within reach, and at this code's revision."""
    service.database.check_revision()
    now = service.database.time()
    workers = store.list_workers(service.database)
    alive = [row for row, _ in workers if row.stopped_at is None and now - row.last_seen_at < _LATELY]
    return schemas.Readiness(
        database=service.database.engine.dialect.name, revision=store.REVISION, n_workers=len(alive)
    )
