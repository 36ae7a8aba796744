"""The rows of workers, and which workers count as alive."""

from typing import Any

import pytest

from service.database.database import Database
from service.jobs import queue
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.tables import Job
from service.jobs.workers import (
    WORKER_KEPT,
    WorkerIdentity,
    is_alive,
    list_workers,
    worker_seen,
    worker_started,
    worker_stopped,
)
from tests.databases import Clock


def submit(db: Database, **changes: Any) -> Job:
    return submit_job(db, NewJob(**{"text": "a b", "config": {}, **changes}))[0]


def test_workers_are_listed_with_what_they_run(db: Database, clock: Clock) -> None:
    first = WorkerIdentity(
        name="gpu-1",
        devices=[{"device": "cuda:0", "name": "H100", "memory_bytes": 80}],
        slots=2,
        cohort=8,
        versions={"torch": "2"},
    )
    worker_started(db, first)
    clock.advance(1)
    second = WorkerIdentity(name="gpu-1")
    worker_started(db, second)
    claims = [submit(db) and queue.claim(db, first, 60) for _ in range(2)]
    clock.advance(1)
    worker_seen(db, first.id)
    (row, running), (other, idle) = list_workers(db)
    assert (row.id, row.name, row.slots, row.versions) == (first.id, "gpu-1", 2, {"torch": "2"})
    assert row.devices == [{"device": "cuda:0", "name": "H100", "memory_bytes": 80, "cohort": 8}]
    assert [job.id for job in running] == [claim.job_id for claim in claims if claim is not None]
    assert (row.last_seen_at, row.stopped_at) == (clock.now, None)
    assert (other.id, idle) == (second.id, [])
    worker_stopped(db, second.id)
    assert list_workers(db)[1][0].stopped_at == clock.now


@pytest.mark.parametrize("lease_seconds", [15.0, 1200.0])
def test_a_worker_is_alive_for_a_lease_after_it_was_seen_unless_it_stopped(
    db: Database, clock: Clock, lease_seconds: float
) -> None:
    identity = WorkerIdentity(lease_seconds=lease_seconds)
    worker_started(db, identity)

    def alive() -> bool:
        return is_alive(list_workers(db)[0][0], db.time())

    clock.advance(lease_seconds - 1)
    assert alive()
    clock.advance(1)
    assert not alive()
    worker_seen(db, identity.id)
    assert alive()
    worker_stopped(db, identity.id)
    assert not alive()


def test_a_worker_not_seen_for_a_day_is_forgotten(db: Database, clock: Clock) -> None:
    old, new = WorkerIdentity(name="old"), WorkerIdentity(name="new")
    worker_started(db, old)
    clock.advance(WORKER_KEPT.total_seconds() + 1)
    worker_started(db, new)
    assert [worker.id for worker, _ in list_workers(db)] == [new.id]
