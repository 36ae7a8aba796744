"""Jobs come and go: submitting and deleting, on SQLite and on PostgreSQL."""

from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.database.caller import Caller
from service.database.database import Database
from service.errors import Conflict, Invalid, NotFound, TooManyRequests
from service.jobs import queue, reads, recording
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_finished_job, submit_job
from service.jobs.workers import WorkerIdentity
from tests.databases import ONLY_POSTGRESQL
from tests.queued import CHECKPOINT, STEPS, claim, everything, running, statuses, submit
from tests.races import Races, at_once


def test_a_submitted_job_waits_with_all_that_was_said_of_it(db: Database) -> None:
    job = submit(
        db, "São João\0!", name="festa", tags={"curso": "pln"}, n_tokens=3, warnings=[{"code": "a"}], priority=2
    )
    found = reads.get_job(db, job.id)
    assert (found.status, found.name, found.tags, found.n_tokens, found.priority) == (
        "queued", "festa", {"curso": "pln"}, 3, 2,
    )  # fmt: skip
    assert found.config == {"epochs": 1}
    assert found.warnings == [{"code": "a"}]
    assert found.text_n_bytes == len("São João\0!".encode())
    assert reads.get_text(db, found.text_sha256).decode() == "São João\0!"
    assert statuses(db, job.id) == ["queued"]


def test_a_key_that_is_sent_twice_makes_one_job(db: Database) -> None:
    new = NewJob(text="a b", config={"lr": 1e-4}, idempotency_key="k")
    first, created = submit_job(db, new)
    again, created_again = submit_job(db, new)
    assert (created, created_again) == (True, False)
    assert again.id == first.id
    assert reads.count_jobs(db)["queued"] == 1


@pytest.mark.parametrize("change", [{"text": "c d"}, {"config": {"lr": 1e-3}}, {"name": "n"}, {"tags": {"a": "b"}}])
def test_a_key_is_refused_for_another_request(db: Database, change: dict[str, Any]) -> None:
    new = NewJob(text="a b", config={"lr": 1e-4}, idempotency_key="k")
    submit_job(db, new)
    with pytest.raises(Invalid) as refused:
        submit_job(db, replace(new, **change))
    assert refused.value.code == "idempotency_key_reused"
    assert reads.count_jobs(db)["queued"] == 1


def test_each_owner_has_keys_of_its_own(db: Database) -> None:
    new = NewJob(text="a b", config={}, idempotency_key="k")
    mine, _ = submit_job(db.acting_as(Caller("me")), new)
    yours, created = submit_job(db.acting_as(Caller("you")), new)
    assert created
    assert mine.id != yours.id


def test_fifty_submits_at_once_with_one_key_make_one_job(db: Database) -> None:
    new = NewJob(text="a b", config={}, idempotency_key="k")
    answers = at_once([lambda: submit_job(db, new)] * 50)
    assert len({job.id for job, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert reads.count_jobs(db)["queued"] == 1


def test_a_submit_waits_for_the_commit_of_another_with_its_key(db: Database, races: Races) -> None:
    new = NewJob(text="a b", config={}, idempotency_key="k")
    first = races.hold(submit_job, db, new)
    second = races.start(submit_job, db, new)
    job, created = first.let_go()
    assert created
    assert second.result() == (job, False)


@ONLY_POSTGRESQL  # SQLite has one writer, which looks before it inserts
def test_without_the_unique_index_one_key_makes_two_jobs(db: Database, races: Races) -> None:
    with db.write() as session:
        session.execute(sa.text("DROP INDEX ix_jobs_idempotency"))
    new = NewJob(text="a b", config={}, idempotency_key="k")
    held = races.hold(submit_job, db, new)
    other = races.start(submit_job, db, new)
    held.let_go()
    _, created = other.result()
    assert created
    assert reads.count_jobs(db)["queued"] == 2


def test_jobs_are_numbered_in_the_order_of_their_commits(db: Database, races: Races) -> None:
    first = races.hold(submit, db)
    second = races.start(submit, db, text="another")
    assert first.let_go().seq < second.result().seq


@ONLY_POSTGRESQL  # SQLite has one writer
def test_with_a_sequence_instead_of_the_counters_row_a_later_commit_gets_a_lower_number(
    db: Database, races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    with db.write() as session:
        session.execute(sa.text("CREATE SEQUENCE without_lock"))
    without_lock = sa.text("SELECT nextval('without_lock')")
    monkeypatch.setattr("service.jobs.submit._next_seq", lambda session: session.scalar(without_lock))
    first = races.hold(submit, db, text="one")
    second = submit(db, text="another")
    assert [job.id for job in reads.list_jobs(db)] == [second.id]  # a page, and its cursor, without the first
    assert first.let_go().seq < second.seq


def test_numbers_are_unique_however_many_submit(db: Database) -> None:
    jobs = at_once([lambda number=number: submit(db, text=f"text {number}") for number in range(16)])
    assert len({job.seq for job in jobs}) == 16


def test_a_full_queue_takes_no_more(db: Database) -> None:
    for _ in range(3):
        submit(db)
    new = NewJob(text="a b", config={}, idempotency_key="k")
    with pytest.raises(TooManyRequests) as refused:
        submit_job(db, new, max_queued=3)
    assert refused.value.code == "queue_full"
    submit_job(db, new, max_queued=4)
    _, created = submit_job(db, new, max_queued=4)  # a repeated key is answered although the queue is full
    assert not created


def test_a_parent_must_exist(db: Database) -> None:
    with pytest.raises(NotFound):
        submit(db, parent_id="0" * 32, parent_percent=100)
    assert reads.count_jobs(db)["queued"] == 0


def test_one_text_is_stored_once(db: Database) -> None:
    first, second = submit(db), submit(db)
    assert first.text_sha256 == second.text_sha256
    assert len(everything(db)["texts"]) == 1


def test_a_deleted_job_takes_everything_but_a_shared_text(db: Database, worker: WorkerIdentity) -> None:
    untouched = everything(db)
    first, second = running(db, worker), running(db, worker)
    for held in (first, second):
        recording.record_steps(db, held, STEPS)
        recording.record_checkpoint(db, held, percent=0, **CHECKPOINT)
        recording.record_snapshot(db, held, step=1, folder="s", manifest_sha256="m")
        queue.finish(db, held, "succeeded")
    queue.delete(db, first.job_id)
    with pytest.raises(NotFound):
        reads.get_job(db, first.job_id)
    assert reads.series(db, second.job_id)["step"] == [1, 2]
    assert reads.get_text(db, second.job.text_sha256)
    queue.delete(db, second.job_id)
    kept = {"counters": everything(db)["counters"]}  # no number is given twice
    assert everything(db) == untouched | kept
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
    assert reads.get_job(db, job.id).status == status


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
    assert reads.get_text(db, other.text_sha256)


def test_a_submit_that_meets_a_delete_of_the_same_text_stores_it_anew(db: Database, races: Races) -> None:
    job = submit(db)
    queue.request_cancel(db, job.id)
    deleting = races.hold(queue.delete, db, job.id)
    submitting = races.start(submit, db)
    deleting.let_go()
    assert reads.get_text(db, submitting.result().text_sha256)


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


def imported(db: Database, job_id: str = "0" * 31 + "1") -> str:
    """The id of a job whose weights came from elsewhere."""
    new = NewJob(text="a b", config={"epochs": 1}, name="gpt2", n_tokens=3, n_params=5, n_active_params=5)
    file = {"name": "config.json", "size": 3, "sha256": "0" * 64}
    submit_finished_job(
        db,
        new,
        job_id=job_id,
        reason="imported",
        folder=f"jobs/{job_id}/f0-100",
        manifest_sha256="1" * 64,
        files=[file],
        metrics={"loss": 1.0},
    )
    return job_id


def test_an_imported_job_has_ended_with_one_checkpoint_and_is_claimed_by_nobody(db: Database) -> None:
    job_id = imported(db)
    job = reads.get_job(db, job_id)
    assert (job.status, job.status_reason, job.fence, job.n_params) == ("succeeded", "imported", 0, 5)
    assert job.finished_at is not None
    assert [row.percent for row in reads.list_checkpoints(db, job_id)] == [100]
    assert statuses(db, job_id) == ["succeeded"]
    assert queue.claim(db, WorkerIdentity(name="test"), lease_seconds=60) is None
    waiting = submit(db, "a b")
    assert waiting.seq > job.seq
    queue.delete(db, job_id)
    with pytest.raises(NotFound):
        reads.get_job(db, job_id)


def test_an_imported_job_whose_row_cannot_be_written_leaves_no_row(db: Database) -> None:
    imported(db)
    with pytest.raises(IntegrityError):
        imported(db)
    assert len(reads.list_jobs(db)) == 1
