"""The queue's conformance suite: every test runs on SQLite and on PostgreSQL."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

from service import queue, store
from service.database import Database
from service.errors import Conflict, Invalid, LeaseLost, NotFound, SchemaMismatch, TooManyRequests
from service.queue import Claim, Intents, NewJob
from service.store import Job, WorkerIdentity
from service.tables import Checkpoint, table
from tests.databases import ONLY_POSTGRESQL, Clock
from tests.races import Races, at_once

LEASE = 60.0
EXECUTION = {"device": "cpu", "micro_batch": 8}
STEPS = {"step": [1, 2], "train_loss": [9.0, 8.0], "lr": [1e-4, 1e-4], "grad_norm": [1.0, 2.0]}
CHECKPOINT = {"step": 0, "epoch": 0.0, "folder": "f", "manifest_sha256": "m", "files": [], "metrics": {"loss": 9.0}}


@pytest.fixture
def worker(db: Database) -> WorkerIdentity:
    found = WorkerIdentity(name="here")
    store.worker_started(db, found)
    return found


def submit(db: Database, text: str = "Era uma vez", **changes: Any) -> Job:
    job, created = queue.submit(db, NewJob(**{"text": text, "config": {"epochs": 1}, **changes}))
    assert created
    return job


def claim(db: Database, worker: WorkerIdentity) -> Claim:
    found = queue.claim(db, worker, LEASE)
    assert found is not None
    return found


def running(db: Database, worker: WorkerIdentity, **changes: Any) -> Claim:
    job = submit(db, **changes)
    found = claim(db, worker)
    assert found.job_id == job.id
    return found


def statuses(db: Database, job_id: str) -> list[str]:
    return [event.data["status"] for event in store.events_after(db, job_id, 0) if event.kind == "status"]


def everything(db: Database) -> dict[str, list[Any]]:
    """Every row of every table, to tell that nothing was written."""
    with db.read() as session:
        return {
            name: sorted(map(tuple, session.execute(sa.select(found)).all()), key=str)
            for name, found in Job.metadata.tables.items()
        }


# Submitting


def test_a_submitted_job_waits_with_all_that_was_said_of_it(db: Database) -> None:
    job = submit(
        db, "São João\0!", name="festa", tags={"curso": "pln"}, n_tokens=3, warnings=[{"code": "a"}], priority=2
    )
    found = store.get_job(db, job.id)
    assert (found.status, found.name, found.tags, found.n_tokens, found.priority) == (
        "queued", "festa", {"curso": "pln"}, 3, 2,
    )  # fmt: skip
    assert found.config == {"epochs": 1}
    assert found.warnings == [{"code": "a"}]
    assert found.text_n_bytes == len("São João\0!".encode())
    assert store.get_text(db, found.text_sha256).decode() == "São João\0!"
    assert statuses(db, job.id) == ["queued"]


def test_a_key_that_is_sent_twice_makes_one_job(db: Database) -> None:
    new = NewJob(text="a b", config={"lr": 1e-4}, idempotency_key="k")
    first, created = queue.submit(db, new)
    again, created_again = queue.submit(db, new)
    assert (created, created_again) == (True, False)
    assert again.id == first.id
    assert store.count_jobs(db)["queued"] == 1


@pytest.mark.parametrize("change", [{"text": "c d"}, {"config": {"lr": 1e-3}}, {"name": "n"}, {"tags": {"a": "b"}}])
def test_a_key_is_refused_for_another_request(db: Database, change: dict[str, Any]) -> None:
    new = NewJob(text="a b", config={"lr": 1e-4}, idempotency_key="k")
    queue.submit(db, new)
    with pytest.raises(Invalid) as refused:
        queue.submit(db, replace(new, **change))
    assert refused.value.code == "idempotency_key_reused"
    assert store.count_jobs(db)["queued"] == 1


def test_each_owner_has_keys_of_its_own(db: Database) -> None:
    new = NewJob(text="a b", config={}, idempotency_key="k")
    mine, _ = queue.submit(db, replace(new, owner="me"))
    yours, created = queue.submit(db, replace(new, owner="you"))
    assert created
    assert mine.id != yours.id


def test_fifty_submits_at_once_with_one_key_make_one_job(db: Database) -> None:
    new = NewJob(text="a b", config={}, idempotency_key="k")
    answers = at_once([lambda: queue.submit(db, new)] * 50)
    assert len({job.id for job, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert store.count_jobs(db)["queued"] == 1


def test_a_submit_waits_for_the_commit_of_another_with_its_key(db: Database, races: Races) -> None:
    new = NewJob(text="a b", config={}, idempotency_key="k")
    first = races.hold(queue.submit, db, new)
    second = races.start(queue.submit, db, new)
    job, created = first.let_go()
    assert created
    assert second.result() == (job, False)


@ONLY_POSTGRESQL  # SQLite has one writer, which looks before it inserts
def test_without_the_unique_index_one_key_makes_two_jobs(db: Database, races: Races) -> None:
    with db.write() as session:
        session.execute(sa.text("DROP INDEX ix_jobs_idempotency"))
    new = NewJob(text="a b", config={}, idempotency_key="k")
    held = races.hold(queue.submit, db, new)
    other = races.start(queue.submit, db, new)
    held.let_go()
    _, created = other.result()
    assert created
    assert store.count_jobs(db)["queued"] == 2


def test_a_full_queue_takes_no_more(db: Database) -> None:
    for _ in range(3):
        submit(db)
    new = NewJob(text="a b", config={}, idempotency_key="k")
    with pytest.raises(TooManyRequests) as refused:
        queue.submit(db, new, max_queued=3)
    assert refused.value.code == "queue_full"
    queue.submit(db, new, max_queued=4)
    _, created = queue.submit(db, new, max_queued=4)  # a repeated key is answered although the queue is full
    assert not created


def test_a_parent_must_exist(db: Database) -> None:
    with pytest.raises(NotFound):
        submit(db, parent_id="0" * 32, parent_percent=100)
    assert store.count_jobs(db)["queued"] == 0


def test_one_text_is_stored_once(db: Database) -> None:
    first, second = submit(db), submit(db)
    assert first.text_sha256 == second.text_sha256
    assert len(everything(db)["texts"]) == 1


# Claiming


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
    assert store.get_job(db, job.id).fence == 1


@ONLY_POSTGRESQL  # SQLite has one writer: see the deferred transaction in test_database.py
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
    assert store.get_job(db, job.id).attempt == 2


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
    assert store.get_job(db, job.id).status == "queued"


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
    assert store.get_job(db, job.id).status == "queued"


def test_an_idle_claim_takes_no_write_lock(db: Database, worker: WorkerIdentity, races: Races) -> None:
    held = races.hold(store.worker_seen, db, worker.id)
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


def copy_job(db: Database, job: Job, times: int, **values: Any) -> None:
    jobs = table(Job)
    row = {column.name: getattr(job, column.name) for column in jobs.columns} | values
    with db.write() as session:
        session.execute(sa.insert(jobs), [row | {"id": store.new_id()} for _ in range(times)])


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


# The owner's writes


def prepare(db: Database, held: Claim) -> None:
    model = {"n_params": 1, "n_active_params": 1}
    queue.record_prepared(db, held, execution=EXECUTION, n_tokens=9, total_steps=4, model=model)


def out_of_memory(db: Database, held: Claim) -> Job:
    prepare(db, held)
    return queue.release_smaller(
        db, held, micro_batch=4, reason="memory ran out", warnings=[{"code": "a"}, {"code": "b"}]
    )


OWNERS_WRITES: dict[str, Callable[[Database, Claim], object]] = {
    "heartbeat": lambda db, claim: queue.heartbeat(db, claim, {"step": 7}),
    "prepared": lambda db, claim: prepare(db, claim),
    "steps": lambda db, claim: queue.record_steps(db, claim, STEPS, {"step": 2}),
    "checkpoint": lambda db, claim: queue.record_checkpoint(db, claim, percent=0, **CHECKPOINT),
    "snapshot": lambda db, claim: queue.record_snapshot(db, claim, step=1, folder="s", manifest_sha256="m"),
    "event": lambda db, claim: queue.record_event(db, claim, "warning", {"code": "w", "message": "m"}),
    "micro-batch": lambda db, claim: (prepare(db, claim), queue.record_micro_batch(db, claim, 2)),
    "rewind": lambda db, claim: queue.rewind(db, claim, 0),
    "finish": lambda db, claim: queue.finish(db, claim, "succeeded"),
    "failure": lambda db, claim: queue.finish(db, claim, "failed", error={"code": "e", "message": "m"}),
    "release": lambda db, claim: queue.release(db, claim),
    "crash": lambda db, claim: queue.release(db, claim, crash="signal 9"),
    "out of memory": out_of_memory,
    "pause": lambda db, claim: queue.release(db, claim, pause_reason="the disk is full"),
}
every_write = pytest.mark.parametrize("write", OWNERS_WRITES.values(), ids=OWNERS_WRITES)


@every_write
def test_an_owner_may_write(db: Database, worker: WorkerIdentity, write: Callable[[Database, Claim], object]) -> None:
    held = running(db, worker)
    before = everything(db)
    write(db, held)
    assert everything(db) != before


@every_write
def test_a_stale_owner_writes_nothing(
    db: Database, clock: Clock, worker: WorkerIdentity, write: Callable[[Database, Claim], object]
) -> None:
    """It was stopped past its lease; a rescuer and a second claim came before it went on."""
    stale = running(db, worker)
    clock.advance(LEASE + 1)
    store.worker_seen(db, worker.id)
    assert [job.id for job in queue.rescue(db)] == [stale.job_id]
    fresh = claim(db, worker)
    assert (fresh.job_id, fresh.fence) == (stale.job_id, stale.fence + 1)
    queue.record_steps(db, fresh, STEPS)
    before = everything(db)
    with pytest.raises(LeaseLost):
        write(db, stale)
    assert everything(db) == before


@every_write
def test_nobody_writes_to_a_job_that_has_ended(
    db: Database, worker: WorkerIdentity, write: Callable[[Database, Claim], object]
) -> None:
    held = running(db, worker)
    queue.finish(db, held, "succeeded")
    before = everything(db)
    with pytest.raises(LeaseLost):
        write(db, held)
    assert everything(db) == before


def test_without_the_fence_a_stale_owner_would_overwrite(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = running(db, worker)
    clock.advance(LEASE + 1)
    queue.rescue(db)
    clock.advance(queue.MAX_BACKOFF.total_seconds())
    fresh = claim(db, worker)
    own = queue._own

    def own_without_fence(db: Database, session: Any, held: Claim, **values: Any) -> Any:
        current = held.job.model_copy(update={"fence": store.load_job(session, held.job_id).fence})
        return own(db, session, replace(held, job=current), **values)

    monkeypatch.setattr(queue, "_own", own_without_fence)
    queue.finish(db, stale, "failed", error={"code": "stale", "message": "an old result"})
    monkeypatch.undo()
    with pytest.raises(LeaseLost):
        queue.finish(db, fresh, "succeeded")
    assert store.get_job(db, fresh.job_id).status == "failed"


def test_a_heartbeat_renews_the_lease_and_keeps_the_progress(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    clock.advance(50)
    queue.heartbeat(db, held, {"step": 3})
    clock.advance(50)
    assert queue.heartbeat(db, held) == Intents(cancel=False, pause=False)
    job = store.get_job(db, held.job_id)
    assert job.lease_until == clock.now + timedelta(seconds=LEASE)
    assert job.progress == {"step": 3}
    assert queue.rescue(db) == []


def test_what_the_first_start_decided_stays(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker, warnings=[{"code": "known", "message": "from the config"}])
    first = {"execution": {"device": "cpu"}, "n_tokens": 9, "total_steps": 4}
    model = {"n_params": 5, "n_active_params": 3}
    queue.record_prepared(db, held, **first, model=model, warnings=[{"code": "new", "message": "m"}])
    queue.release(db, held)
    again = claim(db, worker)
    assert again.job.execution == {"device": "cpu"}
    repeated = [{"code": "known", "message": "again"}, {"code": "new", "message": "again"}]
    queue.record_prepared(db, again, **first | {"execution": {"device": "cuda"}}, model=model, warnings=repeated)
    job = store.get_job(db, held.job_id)
    assert job.execution == {"device": "cpu"}
    assert (job.n_tokens, job.total_steps, job.n_params, job.n_active_params) == (9, 4, 5, 3)
    assert job.warnings == [{"code": "known", "message": "from the config"}, {"code": "new", "message": "m"}]


def test_what_the_memory_does_not_hold_is_known_to_every_later_attempt(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    prepare(db, held)
    queue.record_micro_batch(db, held, 6)
    job = out_of_memory(db, held)
    assert (job.status, job.status_reason, job.crashes) == ("queued", "memory ran out", 0)
    assert [event.data["code"] for event in store.events_after(db, job.id, 0) if event.kind == "warning"] == ["a", "b"]
    again = claim(db, worker)
    assert again.job.execution == {"device": "cpu", "micro_batch": 4}
    prepare(db, again)
    assert store.get_job(db, job.id).execution == {"device": "cpu", "micro_batch": 4}


@pytest.mark.parametrize(("ask", "status"), [(queue.request_cancel, "cancelled"), (queue.request_pause, "paused")])
def test_a_job_that_ran_out_of_memory_obeys_what_was_asked_of_its_owner(
    db: Database, worker: WorkerIdentity, ask: Callable[[Database, str], Job], status: str
) -> None:
    held = running(db, worker)
    ask(db, held.job_id)
    assert out_of_memory(db, held).status == status


def test_a_checkpoint_written_again_replaces_its_row(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    queue.record_checkpoint(db, held, percent=25, **CHECKPOINT)
    queue.record_checkpoint(db, held, percent=25, **CHECKPOINT | {"folder": "newer", "metrics": {"loss": 1.0}})
    (found,) = store.list_checkpoints(db, held.job_id)
    assert (found.folder, found.metrics, found.fence) == ("newer", {"loss": 1.0}, 1)


def test_a_job_has_one_snapshot_the_newest(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    for step in (10, 20):
        queue.record_snapshot(db, held, step=step, folder=f"s{step}", manifest_sha256="m")
    found = store.find_snapshot(db, held.job_id)
    assert found is not None
    assert (found.step, found.folder) == (20, "s20")


def test_an_ended_job_has_no_snapshot(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    queue.record_snapshot(db, held, step=1, folder="s1", manifest_sha256="m")
    queue.finish(db, held, "succeeded")
    assert store.find_snapshot(db, held.job_id) is None


def test_rewinding_forgets_the_steps_past_the_snapshot(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    queue.record_steps(db, held, STEPS)
    queue.record_snapshot(db, held, step=2, folder="s2", manifest_sha256="m")
    queue.rewind(db, held, 1)
    assert store.series(db, held.job_id)["step"] == [1]
    assert store.find_snapshot(db, held.job_id) is None


def test_events_are_numbered_without_a_gap(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    queue.record_event(db, held, "warning", {"code": "w", "message": "m"})
    queue.record_checkpoint(db, held, percent=0, **CHECKPOINT)
    queue.heartbeat(db, held)
    queue.finish(db, held, "succeeded")
    events = store.events_after(db, held.job_id, 0)
    assert [(event.seq, event.kind) for event in events] == [
        (1, "status"), (2, "status"), (3, "warning"), (4, "checkpoint"), (5, "status"),
    ]  # fmt: skip
    assert [event.seq for event in store.events_after(db, held.job_id, 3, limit=1)] == [4]
    assert store.get_job(db, held.job_id).event_seq == 5


# The ends of a job


def test_a_job_succeeds(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    clock.advance(9)
    job = queue.finish(db, held, "succeeded", progress={"percent": 100})
    assert (job.status, job.finished_at, job.lease_until, job.error) == ("succeeded", clock.now, None, None)
    assert job.progress == {"percent": 100}
    assert store.get_job(db, job.id) == job
    assert statuses(db, job.id) == ["queued", "running", "succeeded"]


def test_a_job_fails_with_a_reason(db: Database, worker: WorkerIdentity) -> None:
    error = {"code": "loss_not_finite", "message": "step 3"}
    job = queue.finish(db, running(db, worker), "failed", error=error)
    assert (job.status, job.error) == ("failed", error)


def test_a_finish_that_commits_first_beats_a_cancel(db: Database, worker: WorkerIdentity, races: Races) -> None:
    held = running(db, worker)
    finish = races.hold(queue.finish, db, held, "succeeded")
    cancel = races.start(queue.request_cancel, db, held.job_id)
    assert finish.let_go().status == "succeeded"
    with pytest.raises(Conflict) as refused:
        cancel.result()
    assert refused.value.code == "not_cancellable"
    assert store.get_job(db, held.job_id).cancel_requested_at is None


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_a_cancel_that_commits_first_beats_a_finish(
    db: Database, worker: WorkerIdentity, races: Races, status: Any
) -> None:
    held = running(db, worker)
    error = {"code": "e", "message": "m"} if status == "failed" else None
    cancel = races.hold(queue.request_cancel, db, held.job_id)
    finish = races.start(queue.finish, db, held, status, error=error)
    assert cancel.let_go().status == "running"
    assert finish.result().status == "cancelled"
    assert statuses(db, held.job_id) == ["queued", "running", "cancelled"]


def test_the_database_itself_refuses_a_status_that_contradicts_the_row(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    jobs = table(Job)
    for values in (
        {"status": "succeeded"},  # without finished_at, and still leased
        {"status": "succeeded", "lease_until": None},
        {"finished_at": held.job.created_at},
        {"status": "queued"},  # still leased
        {"lease_until": None},
        {"worker_id": None},
        {"status": "stopped"},
        {"fence": -1},
    ):
        with pytest.raises(IntegrityError), db.write() as session:
            session.execute(sa.update(jobs).where(jobs.c.id == held.job_id).values(values))
    assert store.get_job(db, held.job_id) == held.job


# Cancel, pause, resume


def test_a_waiting_job_is_cancelled_at_once(db: Database, worker: WorkerIdentity) -> None:
    job = submit(db)
    assert queue.request_cancel(db, job.id).status == "cancelled"
    assert queue.claim(db, worker, LEASE) is None
    assert statuses(db, job.id) == ["queued", "cancelled"]


def test_a_paused_job_is_cancelled_at_once(db: Database) -> None:
    job = submit(db)
    queue.request_pause(db, job.id)
    assert queue.request_cancel(db, job.id).status == "cancelled"


def test_the_owner_of_a_running_job_is_asked_to_cancel(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    assert queue.request_cancel(db, held.job_id).status == "running"
    assert queue.heartbeat(db, held) == Intents(cancel=True, pause=False)
    assert queue.record_steps(db, held, STEPS).cancel
    assert queue.finish(db, held, "cancelled").status == "cancelled"


def test_a_waiting_job_is_paused_and_goes_on_in_its_old_place(db: Database, worker: WorkerIdentity) -> None:
    first, second = submit(db), submit(db)
    paused = queue.request_pause(db, first.id)
    assert (paused.status, paused.pause_requested_at) == ("paused", None)
    assert paused.status_reason is not None
    assert queue.queue_position(db, second.id) == 0
    resumed = queue.resume(db, first.id)
    assert (resumed.status, resumed.status_reason) == ("queued", None)
    assert claim(db, worker).job_id == first.id
    assert statuses(db, first.id) == ["queued", "paused", "queued", "running"]


def test_the_owner_of_a_running_job_is_asked_to_pause(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    assert queue.request_pause(db, held.job_id).status == "running"
    assert queue.heartbeat(db, held) == Intents(cancel=False, pause=True)
    job = queue.release(db, held)
    assert (job.status, job.pause_requested_at, job.lease_until) == ("paused", None, None)
    assert queue.resume(db, job.id).status == "queued"
    assert claim(db, worker).fence == held.fence + 1


def test_cancel_beats_pause(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    queue.request_cancel(db, held.job_id)
    queue.request_pause(db, held.job_id)
    assert queue.release(db, held).status == "cancelled"


def test_a_resume_before_the_owner_has_paused_keeps_the_job_in_line(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    queue.request_pause(db, held.job_id)
    assert queue.heartbeat(db, held).pause
    resume = races.hold(queue.resume, db, held.job_id)
    step_to_paused = races.start(queue.release, db, held)
    assert resume.let_go().status == "running"
    assert step_to_paused.result().status == "queued"


def test_a_resume_after_the_owner_has_paused_puts_the_job_in_line(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    queue.request_pause(db, held.job_id)
    step_to_paused = races.hold(queue.release, db, held)
    resume = races.start(queue.resume, db, held.job_id)
    assert step_to_paused.let_go().status == "paused"
    assert resume.result().status == "queued"


def test_a_cancel_that_meets_a_claim_reaches_the_new_owner(db: Database, worker: WorkerIdentity, races: Races) -> None:
    job = submit(db)
    claiming = races.hold(queue.claim, db, worker, LEASE)
    cancel = races.start(queue.request_cancel, db, job.id)
    held = claiming.let_go()
    assert cancel.result().status == "running"
    assert held is not None
    assert queue.heartbeat(db, held).cancel


def test_a_claim_that_meets_a_cancel_gets_nothing(db: Database, worker: WorkerIdentity, races: Races) -> None:
    job = submit(db)
    cancel = races.hold(queue.request_cancel, db, job.id)
    claiming = races.start(queue.claim, db, worker, LEASE)
    assert cancel.let_go().status == "cancelled"
    assert claiming.result() is None


def test_a_worker_may_pause_a_job_for_its_own_reason(db: Database, worker: WorkerIdentity) -> None:
    job = queue.release(db, running(db, worker), pause_reason="the disk is full")
    assert (job.status, job.status_reason) == ("paused", "the disk is full")


def test_asking_again_is_harmless(db: Database, worker: WorkerIdentity) -> None:
    job = submit(db)
    for ask, status in (
        (queue.request_pause, "paused"),
        (queue.resume, "queued"),
        (queue.request_cancel, "cancelled"),
    ):
        assert ask(db, job.id).status == status
        before = everything(db)
        assert ask(db, job.id).status == status
        assert everything(db) == before
    held = running(db, worker)
    for ask in (queue.request_pause, queue.request_cancel):
        asked = ask(db, held.job_id)
        assert ask(db, held.job_id) == asked


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (queue.request_cancel, "not_cancellable"),
        (queue.request_pause, "not_pausable"),
        (queue.resume, "not_resumable"),
    ],
)
def test_a_job_that_has_ended_stays_ended(
    db: Database, worker: WorkerIdentity, ask: Callable[[Database, str], Job], code: str
) -> None:
    held = running(db, worker)
    queue.finish(db, held, "succeeded")
    before = everything(db)
    with pytest.raises(Conflict) as refused:
        ask(db, held.job_id)
    assert refused.value.code == code
    assert everything(db) == before
    with pytest.raises(NotFound):
        ask(db, "0" * 32)


# Rescue and crashes


def test_a_lease_that_holds_is_not_rescued(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    clock.advance(LEASE)
    assert queue.rescue(db) == []
    queue.heartbeat(db, held)


def test_a_job_whose_worker_is_gone_waits_and_counts_a_crash(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    (job,) = queue.rescue(db)
    assert (job.status, job.crashes, job.lease_until) == ("queued", 1, None)
    assert job.run_at == clock.now + queue.BACKOFF
    assert worker.id in (job.status_reason or "")
    assert queue.rescue(db) == []
    assert queue.claim(db, worker, LEASE) is None
    clock.advance(15)
    assert claim(db, worker).fence == held.fence + 1


def test_a_lease_lost_by_a_worker_that_lives_counts_no_crash(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    store.worker_seen(db, worker.id)
    (job,) = queue.rescue(db)
    assert (job.status, job.crashes, job.run_at) == ("queued", 0, held.job.run_at)


def test_a_worker_that_said_goodbye_is_gone(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    running(db, worker)
    clock.advance(LEASE + 1)
    store.worker_seen(db, worker.id)
    store.worker_stopped(db, worker.id)
    assert [job.crashes for job in queue.rescue(db)] == [1]


def test_a_rescued_job_obeys_what_was_asked_of_its_owner(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    cancelled, paused = running(db, worker), running(db, worker)
    queue.request_cancel(db, cancelled.job_id)
    queue.request_pause(db, cancelled.job_id)
    queue.request_pause(db, paused.job_id)
    clock.advance(LEASE + 1)
    assert [(job.id, job.status) for job in queue.rescue(db)] == [
        (cancelled.job_id, "cancelled"),
        (paused.job_id, "paused"),
    ]


def test_four_rescuers_at_once_move_a_job_once(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    expected = {running(db, worker).job_id for _ in range(10)}
    clock.advance(LEASE + 1)
    moved = [job.id for jobs in at_once([lambda: queue.rescue(db)] * 4) for job in jobs]
    assert len(moved) == 10
    assert set(moved) == expected
    assert {store.get_job(db, job_id).crashes for job_id in expected} == {1}


def test_a_rescuer_passes_over_what_another_is_rescuing(
    db: Database, clock: Clock, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    first = races.hold(queue.rescue, db)
    second = races.start(queue.rescue, db)
    assert [job.id for job in first.let_go()] == [held.job_id]
    assert second.result() == []
    assert store.get_job(db, held.job_id).crashes == 1


def test_a_heartbeat_that_comes_after_the_rescue_is_lost(
    db: Database, clock: Clock, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    rescue = races.hold(queue.rescue, db)
    heartbeat = races.start(queue.heartbeat, db, held)
    assert len(rescue.let_go()) == 1
    with pytest.raises(LeaseLost):
        heartbeat.result()


def test_a_heartbeat_that_comes_before_the_rescue_keeps_the_job(
    db: Database, clock: Clock, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    heartbeat = races.hold(queue.heartbeat, db, held)
    rescue = races.start(queue.rescue, db)
    heartbeat.let_go()
    assert rescue.result() == []
    assert store.get_job(db, held.job_id).status == "running"


def test_a_poison_job_is_given_up_after_three_crashes(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    job = submit(db)
    waits = []
    for _ in range(queue.MAX_CRASHES):
        job = queue.release(db, claim(db, worker), crash="signal 11")
        waits.append((job.run_at - clock.now).total_seconds())
        clock.advance(queue.MAX_BACKOFF.total_seconds())
    assert waits[:2] == [15, 30]
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "crashed_repeatedly"
    assert "signal 11" in job.error["message"]


def test_without_the_count_of_crashes_a_poison_job_goes_on_for_ever(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MAX_CRASHES", float("inf"))
    submit(db)
    for attempt in range(1, 21):
        held = claim(db, worker)
        assert held.job.attempt == attempt
        assert queue.release(db, held, crash="signal 9").status == "queued"
        clock.advance(queue.MAX_BACKOFF.total_seconds())


def test_without_telling_a_new_checkpoint_from_one_written_again_a_poison_job_goes_on_for_ever(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that always dies just after its first checkpoint."""
    get = Session.get
    monkeypatch.setattr(Session, "get", lambda self, row, key: None if row is Checkpoint else get(self, row, key))
    submit(db)
    for attempt in range(1, 2 * queue.MAX_CRASHES):
        held = claim(db, worker)
        assert held.job.attempt == attempt
        queue.record_checkpoint(db, held, percent=0, **CHECKPOINT)
        assert queue.release(db, held, crash="signal 9").status == "queued"
        clock.advance(queue.MAX_BACKOFF.total_seconds())


def test_the_wait_after_a_crash_doubles_up_to_a_quarter_of_an_hour(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MAX_CRASHES", 100)
    submit(db)
    waits = []
    for _ in range(8):
        job = queue.release(db, claim(db, worker), crash="signal 11")
        waits.append((job.run_at - clock.now).total_seconds())
        clock.advance(waits[-1])
    assert waits == [15, 30, 60, 120, 240, 480, 900, 900]


def test_a_new_checkpoint_forgets_crashes_and_one_written_again_does_not(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    submit(db)

    def crash(percent: int) -> Job:
        held = claim(db, worker)
        queue.record_checkpoint(db, held, percent=percent, **CHECKPOINT)
        job = queue.release(db, held, crash="signal 11")
        clock.advance(queue.MAX_BACKOFF.total_seconds())
        return job

    assert [crash(percent).crashes for percent in (0, 0, 25, 25)] == [1, 2, 1, 2]
    assert crash(25).status == "failed"


def test_a_drained_job_goes_on_first_and_counts_no_crash(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    submit(db)
    job = queue.release(db, held)
    assert (job.status, job.crashes, job.run_at) == ("queued", 0, held.job.run_at)
    assert claim(db, worker).job_id == job.id


def test_a_lease_too_far_ahead_has_passed(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    """The clock was wrong when the lease was taken, and has been set back since."""
    held = running(db, worker)
    clock.advance(-LEASE)
    assert queue.rescue(db) == []
    clock.advance(-1)
    assert [job.id for job in queue.rescue(db)] == [held.job_id]


def test_leases_of_different_lengths_are_told_apart(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    submit(db)
    long = queue.claim(db, worker, 10 * LEASE)
    short = running(db, worker)
    assert long is not None
    clock.advance(LEASE + 1)
    assert [job.id for job in queue.rescue(db)] == [short.job_id]


def test_a_rescuer_that_slept_skips_a_round(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    """A laptop was closed: the leases look past, but their owners are about to go on."""
    rescuer = queue.Rescuer(db, 15)
    held = running(db, worker)
    assert rescuer.round() == []
    clock.advance(3600)
    assert rescuer.round() == []
    queue.heartbeat(db, held)
    clock.advance(15)
    assert rescuer.round() == []
    assert store.get_job(db, held.job_id).status == "running"


def test_a_rescuer_that_slept_still_rescues_who_does_not_come_back(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    rescuer = queue.Rescuer(db, 15)
    held = running(db, worker)
    rescuer.round()
    clock.advance(3600)
    assert rescuer.round() == []
    clock.advance(15)
    assert [job.id for job in rescuer.round()] == [held.job_id]


def test_a_rescuer_skips_a_round_when_the_clock_was_set_back(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    rescuer = queue.Rescuer(db, 15)
    held = running(db, worker)
    rescuer.round()
    clock.advance(-3600)
    assert rescuer.round() == []
    queue.heartbeat(db, held)
    clock.advance(15)
    assert rescuer.round() == []


def live_through_a_jump(db: Database, clock: Clock, worker: WorkerIdentity, jump: float, phase: int) -> Claim:
    """A minute of a job whose owner keeps it alive, of which two rescuers see a jump of the clock after `phase`."""
    held = running(db, worker)
    rescuers = [queue.Rescuer(db, 15), queue.Rescuer(db, 15)]
    for second in range(60):
        if second == 20 + phase:
            clock.advance(jump)
        if second % 10 == 0:
            try:
                queue.heartbeat(db, held)
                store.worker_seen(db, worker.id)
            except LeaseLost:
                break
        for offset, rescuer in enumerate(rescuers):
            if second % 15 == 7 * offset:
                rescuer.round()
        clock.advance(1)
    return held


@pytest.mark.parametrize("jump", [30, 3600, -70, -1e9])
def test_a_clock_that_jumps_takes_no_job_from_an_owner_who_lives(
    db: Database, clock: Clock, worker: WorkerIdentity, jump: float
) -> None:
    for phase in (1, 8):
        held = live_through_a_jump(db, clock, worker, jump, phase)
        job = store.get_job(db, held.job_id)
        assert (job.status, job.fence, job.crashes) == ("running", 1, 0), f"after {phase} s"
        queue.finish(db, held, "succeeded")


@pytest.mark.parametrize("jump", [3600, -3600])
def test_without_the_skipped_round_a_clock_that_jumps_takes_a_job_from_its_owner(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    monkeypatch.setattr(queue.Rescuer, "round", lambda self: queue.rescue(db))
    job = store.get_job(db, live_through_a_jump(db, clock, worker, jump, 1).job_id)
    assert (job.status, job.fence) == ("queued", 1)
    assert job.crashes == (jump > 0)  # a worker that was last seen an hour ago looks gone, too


# Deleting


def test_a_deleted_job_takes_everything_but_a_shared_text(db: Database, worker: WorkerIdentity) -> None:
    untouched = everything(db)
    first, second = running(db, worker), running(db, worker)
    for held in (first, second):
        queue.record_steps(db, held, STEPS)
        queue.record_checkpoint(db, held, percent=0, **CHECKPOINT)
        queue.record_snapshot(db, held, step=1, folder="s", manifest_sha256="m")
        queue.finish(db, held, "succeeded")
    queue.delete(db, first.job_id)
    with pytest.raises(NotFound):
        store.get_job(db, first.job_id)
    assert store.series(db, second.job_id)["step"] == [1, 2]
    assert store.get_text(db, second.job.text_sha256)
    queue.delete(db, second.job_id)
    assert everything(db) == untouched
    with pytest.raises(NotFound):
        queue.delete(db, second.job_id)


@pytest.mark.parametrize("status", ["queued", "running", "paused"])
def test_a_job_that_has_not_ended_is_not_deleted(db: Database, worker: WorkerIdentity, status: str) -> None:
    job = submit(db)
    if status == "running":
        claim(db, worker)
    if status == "paused":
        queue.request_pause(db, job.id)
    with pytest.raises(Conflict) as refused:
        queue.delete(db, job.id)
    assert refused.value.code == "job_not_finished"
    assert store.get_job(db, job.id).status == status


def test_a_job_that_others_started_from_is_not_deleted(db: Database, worker: WorkerIdentity) -> None:
    parent = running(db, worker)
    queue.finish(db, parent, "succeeded")
    child = submit(db, parent_id=parent.job_id, parent_percent=100)
    with pytest.raises(Conflict) as refused:
        queue.delete(db, parent.job_id)
    assert refused.value.code == "has_dependents"
    queue.request_cancel(db, child.id)
    queue.delete(db, child.id)
    queue.delete(db, parent.job_id)


def test_a_delete_that_meets_a_submit_of_the_same_text_keeps_the_text(db: Database, races: Races) -> None:
    job = submit(db)
    queue.request_cancel(db, job.id)
    submitting = races.hold(submit, db)
    deleting = races.start(queue.delete, db, job.id)
    other = submitting.let_go()
    deleting.result()
    assert store.get_text(db, other.text_sha256)


def test_a_submit_that_meets_a_delete_of_the_same_text_stores_it_anew(db: Database, races: Races) -> None:
    job = submit(db)
    queue.request_cancel(db, job.id)
    deleting = races.hold(queue.delete, db, job.id)
    submitting = races.start(submit, db)
    deleting.let_go()
    assert store.get_text(db, submitting.result().text_sha256)


@ONLY_POSTGRESQL  # SQLite has one writer
def test_without_its_lock_the_text_of_a_new_job_is_deleted_before_the_commit(db: Database, races: Races) -> None:
    job = submit(db)
    queue.request_cancel(db, job.id)

    @sa.event.listens_for(db.engine, "before_cursor_execute", retval=True)
    def _take_away(*arguments: Any) -> tuple[str, Any]:
        statement, parameters = arguments[2:4]
        return statement.replace(" FOR KEY SHARE", ""), parameters

    deleting = races.hold(queue.delete, db, job.id)
    submitting = races.start(submit, db)
    deleting.let_go()
    with pytest.raises(IntegrityError):
        submitting.result()


def test_a_submit_that_meets_a_delete_of_its_parent_finds_none(db: Database, races: Races) -> None:
    parent = submit(db)
    queue.request_cancel(db, parent.id)
    deleting = races.hold(queue.delete, db, parent.id)
    submitting = races.start(submit, db, parent_id=parent.id, parent_percent=100)
    deleting.let_go()
    with pytest.raises(NotFound):
        submitting.result()


def test_a_delete_that_meets_a_submit_from_its_job_is_refused(db: Database, races: Races) -> None:
    parent = submit(db)
    queue.request_cancel(db, parent.id)
    submitting = races.hold(submit, db, parent_id=parent.id, parent_percent=100)
    deleting = races.start(queue.delete, db, parent.id)
    submitting.let_go()
    with pytest.raises(Conflict) as refused:
        deleting.result()
    assert refused.value.code == "has_dependents"


# Waiting in line


def test_the_position_counts_who_goes_first(db: Database, worker: WorkerIdentity) -> None:
    first, second, urgent = submit(db), submit(db), submit(db, priority=1)
    assert [queue.queue_position(db, job.id) for job in (urgent, first, second)] == [0, 1, 2]
    claim(db, worker)
    assert [queue.queue_position(db, job.id) for job in (urgent, first, second)] == [None, 0, 1]
    assert queue.queue_position(db, "0" * 32) is None


def test_the_position_is_counted_up_to_a_thousand(db: Database) -> None:
    first = submit(db)
    copy_job(db, first, 1_200, idempotency_key=None)
    last = submit(db)
    assert queue.queue_position(db, first.id) == 0
    assert queue.queue_position(db, last.id) == queue.MAX_POSITION == 1_000


def test_ids_made_by_many_threads_are_unique_and_in_order() -> None:
    made: list[list[str]] = [[] for _ in range(4)]

    def make(mine: list[str]) -> None:
        mine.extend(store.new_id() for _ in range(2_000))

    threads = [threading.Thread(target=make, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len(set().union(*made)) == 8_000


def test_the_start_is_estimated_for_as_many_as_there_are_slots(db: Database, clock: Clock) -> None:
    worker = WorkerIdentity(slots=2)
    first, second, third, fourth, fifth = (submit(db).id for _ in range(5))
    assert queue.estimated_start(db, first) is None  # no worker is there
    store.worker_started(db, worker)
    assert queue.estimated_start(db, first) == clock.now
    assert queue.estimated_start(db, third) is None  # nobody knows how long the first two take

    claims = [queue.claim(db, worker, 600) for _ in range(2)]
    assert queue.estimated_start(db, third) is None  # nor does one that runs say so yet
    for claim, eta in zip(claims, (90.0, 30.0), strict=True):
        assert claim is not None
        queue.heartbeat(db, claim, {"eta_seconds": eta})
    assert queue.estimated_start(db, third) == clock.now + timedelta(seconds=30)
    assert queue.estimated_start(db, fourth) == clock.now + timedelta(seconds=90)
    assert queue.estimated_start(db, fifth) is None
    assert queue.estimated_start(db, second) is None  # it runs

    clock.advance(61)
    assert queue.estimated_start(db, third) is None  # the worker has not been seen
