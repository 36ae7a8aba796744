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
from service.jobs import queue, reads, recording
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
        if "UPDATE jobs SET status" in statement:
            for protection in (" FOR NO KEY UPDATE SKIP LOCKED", " AND jobs.status = 'queued' AND (EXISTS"):
                assert protection in statement
                statement = statement.replace(protection, " AND (EXISTS" if "EXISTS" in protection else "")
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


@pytest.mark.parametrize("look_first", [True, False])
def test_a_worker_of_another_schema_claims_nothing(db: Database, worker: WorkerIdentity, look_first: bool) -> None:
    job = submit(db)
    with db.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaMismatch) as refused:
        queue.claim_jobs(db, worker, LEASE, 1, look_first=look_first)
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


# Several at once


def test_several_are_claimed_in_the_order_of_the_line(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    small = replace(worker, memory_bytes=5_000)
    submit(db, run_at=clock.now + timedelta(seconds=10), priority=9)
    submit(db, training_bytes=10_000, priority=9)
    crashed = claim(db, small).job_id if submit(db, priority=8) else ""
    queue.release(db, queue.Claim(reads.get_job(db, crashed), LEASE), crash="signal 9")
    ordinary = [submit(db).id for _ in range(3)]
    urgent = submit(db, priority=5).id
    assert [held.job_id for held in queue.claim_jobs(db, small, LEASE, 2)] == [urgent, ordinary[0]]
    rest = queue.claim_jobs(db, small, LEASE, 5)
    assert [held.job_id for held in rest] == ordinary[1:]
    assert [(held.fence, held.job.attempt, held.job.status) for held in rest] == [(1, 1, "running")] * 2
    assert {held.job.lease_until for held in rest} == {clock.now + timedelta(seconds=LEASE)}
    assert statuses(db, rest[1].job_id) == ["queued", "running"]
    assert queue.claim_jobs(db, small, LEASE, 5) == []


def test_workers_that_claim_several_at_once_share_the_line(db: Database, worker: WorkerIdentity) -> None:
    ids = [submit(db).id for _ in range(20)]
    found = at_once([lambda: queue.claim_jobs(db, worker, LEASE, 3)] * 6)
    rest = queue.claim_jobs(db, worker, LEASE, 20)
    claimed = [held.job_id for batch in (*found, rest) for held in batch]
    assert sorted(claimed) == sorted(ids)
    for batch in (*found, rest):
        assert [held.job.seq for held in batch] == sorted(held.job.seq for held in batch)


@ONLY_POSTGRESQL
def test_a_batch_passes_over_rows_that_another_claim_holds(db: Database, worker: WorkerIdentity, races: Races) -> None:
    ids = [submit(db).id for _ in range(5)]
    first = races.hold(queue.claim_jobs, db, worker, LEASE, 2)
    assert [held.job_id for held in queue.claim_jobs(db, worker, LEASE, 2)] == ids[2:4]
    assert [held.job_id for held in first.let_go()] == ids[:2]


@ONLY_POSTGRESQL  # SQLite has one writer
def test_a_job_from_which_another_is_just_being_submitted_is_neither_passed_over_nor_waited_for(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    parent = submit(db).id
    behind = submit(db).id
    child = races.hold(submit, db, parent_id=parent, parent_percent=0)
    held = claim(db, worker)
    assert held.job_id == parent
    recording.heartbeat(db, held)
    assert claim(db, worker).job_id == behind
    child.let_go()


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
    plan = "\n".join(plans_of(db, lambda: queue.claim_jobs(db, worker, LEASE, 8)))
    assert "ix_jobs_claim" in plan
    assert "SCAN jobs USING INDEX ix_jobs_claim" in plan or "Index Scan using ix_jobs_claim" in plan
    # Only the few that are found are sorted, by their owners.
    assert plan.count("TEMP B-TREE") == plan.count("SCAN first\nUSE TEMP B-TREE")
    assert plan.count("Sort Key: ") == plan.count("Sort Key: first.")
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
