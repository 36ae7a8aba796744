"""Places in the line, on SQLite and on PostgreSQL."""

from datetime import datetime, timedelta

from service import queue, store
from service.database import Database
from service.line import MAX_POSITION, find_place
from service.store import WorkerIdentity
from tests.databases import Clock
from tests.queued import claim, copy_job, submit


def position(db: Database, job_id: str) -> int | None:
    place = find_place(db, job_id)
    return place and place.position


def estimate(db: Database, job_id: str) -> datetime | None:
    place = find_place(db, job_id)
    return place and place.estimated_start_at


def test_the_position_counts_who_goes_first(db: Database, worker: WorkerIdentity) -> None:
    first, second, urgent = submit(db), submit(db), submit(db, priority=1)
    assert [position(db, job.id) for job in (urgent, first, second)] == [0, 1, 2]
    claim(db, worker)
    assert [position(db, job.id) for job in (urgent, first, second)] == [None, 0, 1]
    assert position(db, "0" * 32) is None


def test_the_position_is_counted_up_to_a_thousand(db: Database) -> None:
    first = submit(db)
    copy_job(db, first, 1_200, idempotency_key=None)
    last = submit(db)
    assert position(db, first.id) == 0
    assert position(db, last.id) == MAX_POSITION == 1_000


def test_the_start_is_estimated_for_as_many_as_there_are_slots(db: Database, clock: Clock) -> None:
    worker = WorkerIdentity(slots=2)
    first, second, third, fourth, fifth = (submit(db).id for _ in range(5))
    assert estimate(db, first) is None  # no worker is there
    store.worker_started(db, worker)
    assert estimate(db, first) == clock.now
    assert estimate(db, third) is None  # nobody knows how long the first two take

    claims = [queue.claim(db, worker, 600) for _ in range(2)]
    assert estimate(db, third) is None  # nor does one that runs say so yet
    for held, eta in zip(claims, (90.0, 30.0), strict=True):
        assert held is not None
        queue.heartbeat(db, held, {"eta_seconds": eta})
    assert estimate(db, third) == clock.now + timedelta(seconds=30)
    assert estimate(db, fourth) == clock.now + timedelta(seconds=90)
    assert estimate(db, fifth) is None
    assert estimate(db, second) is None  # it runs

    clock.advance(61)
    assert estimate(db, third) is None  # the worker has not been seen


def test_a_worker_with_long_leases_beats_rarely_and_counts_meanwhile(db: Database, clock: Clock) -> None:
    store.worker_started(db, WorkerIdentity(lease_seconds=600))
    job = submit(db)
    clock.advance(599)
    assert estimate(db, job.id) == clock.now
    clock.advance(2)
    assert estimate(db, job.id) is None
