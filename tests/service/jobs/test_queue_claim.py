"""Claims, on SQLite and on PostgreSQL."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from service.database.database import Database
from service.errors import SchemaMismatch
from service.jobs import queue, reads
from service.jobs.lease import Claim
from service.jobs.workers import WorkerIdentity, worker_seen
from tests.databases import ONLY_POSTGRESQL, Clock
from tests.queued import LEASE, claim, copy_job, statuses, submit
from tests.races import Races, at_once


def test_jobs_are_claimed_by_priority_then_in_the_order_they_came(db: Database, worker: WorkerIdentity) -> None:
    ordinary = [submit(db).id for _ in range(3)]
    urgent = [submit(db, priority=5).id for _ in range(2)]
    patient = submit(db, priority=-1).id
    assert [claim(db, worker).job_id for _ in range(6)] == [*urgent, *ordinary, patient]
    assert queue.claim(db, worker, LEASE) is None


def test_a_job_is_not_claimed_before_its_time(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    later = submit(db, run_at=clock.now + timedelta(seconds=10), priority=9)
    now = submit(db)
    assert claim(db, worker).job_id == now.id
    assert queue.claim(db, worker, LEASE) is None
    clock.advance(10)
    assert claim(db, worker).job_id == later.id


def test_a_clock_that_was_ahead_holds_nobody_up_and_lets_nobody_overtake(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    clock.advance(7200)
    first = submit(db)
    clock.advance(-7200)
    second = submit(db)
    assert first.run_at is None
    assert [claim(db, worker).job_id for _ in range(2)] == [first.id, second.id]


def test_a_requeued_job_keeps_its_place(db: Database, worker: WorkerIdentity) -> None:
    first, second = submit(db), submit(db)
    job = queue.release(db, claim(db, worker))
    assert (job.id, job.seq) == (first.id, first.seq)
    assert [claim(db, worker).job_id for _ in range(2)] == [first.id, second.id]


def test_a_job_too_large_for_a_worker_is_left_to_another(db: Database, worker: WorkerIdentity) -> None:
    large = submit(db, training_bytes=10_000, priority=9)
    fits = submit(db, training_bytes=1_000)
    small = replace(worker, memory_bytes=5_000)
    assert claim(db, small).job_id == fits.id
    assert queue.claim(db, small, LEASE) is None
    assert claim(db, worker).job_id == large.id


def test_a_claim_raises_the_fence_and_takes_a_lease(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    submitted = submit(db)
    clock.advance(5)
    held = claim(db, worker)
    job = held.job
    assert (job.status, job.fence, job.attempt, job.worker_id) == ("running", 1, 1, worker.id)
    assert job.lease_until == clock.now + timedelta(seconds=LEASE)
    assert job.started_at == clock.now
    assert job.run_at == submitted.run_at
    assert statuses(db, job.id) == ["queued", "running"]


def test_a_claim_passes_over_the_row_that_another_is_claiming(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    first, second = submit(db), submit(db)
    held = races.hold(queue.claim, db, worker, LEASE)
    other = races.start(queue.claim, db, worker, LEASE)
    if not db.is_sqlite:  # SQLite has one writer: the second waits for the first
        assert claim_id(other.result()) == second.id
    assert claim_id(held.let_go()) == first.id
    assert claim_id(other.result()) == second.id


def claim_id(found: Claim | None) -> str:
    assert found is not None
    return found.job_id


def test_the_last_job_is_claimed_by_one_of_two(db: Database, worker: WorkerIdentity, races: Races) -> None:
    job = submit(db)
    held = races.hold(queue.claim, db, worker, LEASE)
    other = races.start(queue.claim, db, worker, LEASE)
    assert claim_id(held.let_go()) == job.id
    assert other.result() is None
    assert reads.get_job(db, job.id).fence == 1


@ONLY_POSTGRESQL  # SQLite has one writer: see the deferred transaction in test_sqlite.py
def test_without_the_row_lock_and_the_status_check_two_workers_claim_one_job(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    job = submit(db)

    @sa.event.listens_for(db.engine, "before_cursor_execute", retval=True)
    def _take_away(*arguments: Any) -> tuple[str, Any]:
        statement, parameters = arguments[2:4]
        if statement.startswith("UPDATE jobs SET status"):
            assert " FOR UPDATE SKIP LOCKED) AND jobs.status = 'queued'" in statement
            statement = statement.replace(" FOR UPDATE SKIP LOCKED) AND jobs.status = 'queued'", ")")
        return statement, parameters

    held = races.hold(queue.claim, db, worker, LEASE)
    other = races.start(queue.claim, db, worker, LEASE)
    assert claim_id(held.let_go()) == claim_id(other.result()) == job.id
    assert reads.get_job(db, job.id).attempt == 2


def test_eight_workers_claim_every_job_once(db: Database, worker: WorkerIdentity) -> None:
    expected = {submit(db).id for _ in range(40)}

    def claim_all() -> list[str]:
        mine = []
        while (found := queue.claim(db, worker, LEASE)) is not None:
            mine.append(found.job_id)
        return mine

    claimed = [job_id for ids in at_once([claim_all] * 8) for job_id in ids]
    assert len(claimed) == 40
    assert set(claimed) == expected


def test_a_worker_of_another_schema_claims_nothing(db: Database, worker: WorkerIdentity) -> None:
    job = submit(db)
    with db.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaMismatch) as refused:
        queue.claim(db, worker, LEASE)
    assert "9999" in refused.value.detail
    assert reads.get_job(db, job.id).status == "queued"


def test_a_migration_between_the_look_and_the_claim_is_noticed(
    db: Database, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(db)
    write = db.write

    @contextmanager
    def write_after_a_migration() -> Iterator[Any]:
        with write() as session:
            session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        with write() as session:
            yield session

    monkeypatch.setattr(db, "write", write_after_a_migration)
    assert queue.claim(db, worker, LEASE) is None
    assert reads.get_job(db, job.id).status == "queued"


def test_an_idle_claim_takes_no_write_lock(db: Database, worker: WorkerIdentity, races: Races) -> None:
    held = races.hold(worker_seen, db, worker.id)
    assert queue.claim(db, worker, LEASE) is None
    held.let_go()


def test_a_claim_reads_the_index_of_queued_jobs_and_no_more(db: Database, worker: WorkerIdentity) -> None:
    job = submit(db)
    copy_job(db, job, 3_000, status="queued")
    copy_job(db, job, 3_000, status="succeeded", finished_at=job.created_at)
    if not db.is_sqlite:
        with db.write() as session:
            session.execute(sa.text("ANALYZE jobs"))
    plan = "\n".join(plans_of(db, lambda: queue.claim(db, worker, LEASE)))
    assert "ix_jobs_claim" in plan
    assert "SCAN jobs USING INDEX ix_jobs_claim" in plan or "Index Scan using ix_jobs_claim" in plan
    assert "TEMP B-TREE" not in plan
    assert "Sort" not in plan
    assert "Seq Scan on jobs" not in plan


def plans_of(db: Database, call: Callable[[], object]) -> list[str]:
    """How the database carries out every SELECT and UPDATE on jobs that `call` sends."""
    explain = "EXPLAIN QUERY PLAN " if db.is_sqlite else "EXPLAIN "
    found: list[str] = []

    def look(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "FROM jobs" in statement:
            cursor.execute(explain + statement, parameters)
            found.extend(str(row[-1]) for row in cursor.fetchall())

    sa.event.listen(db.engine, "before_cursor_execute", look)
    try:
        call()
    finally:
        sa.event.remove(db.engine, "before_cursor_execute", look)
    return found
