"""Reading jobs, texts and checkpoints."""

from typing import Any

import pytest
import sqlalchemy as sa

from service.database.caller import Caller
from service.database.database import Database
from service.errors import NotFound
from service.jobs import queue, reads, recording
from service.jobs.new_job import NewJob
from service.jobs.statuses import STATUSES
from service.jobs.submit import submit_job
from service.jobs.tables import Job
from service.jobs.workers import (
    WorkerIdentity,
)


def submit(db: Database, **changes: Any) -> Job:
    return submit_job(db, NewJob(**{"text": "a b", "config": {}, **changes}))[0]


def finished(db: Database, worker: WorkerIdentity, percents: tuple[int, ...] = ()) -> Job:
    submit(db)
    claim = queue.claim(db, worker, 60)
    assert claim is not None
    for percent in percents:
        recording.record_checkpoint(
            db, claim, percent=percent, step=percent, epoch=percent / 2, folder=f"jobs/x/f1-{percent}",
            manifest_sha256="m", files=[{"name": "config.json", "size": 2, "sha256": "s"}], metrics={"loss": 1.5},
        )  # fmt: skip
    return queue.finish(db, claim, "succeeded")


def test_on_behalf_of_nobody_nothing_is_there(db: Database) -> None:
    job = submit(db)  # without keys, so that it has no owner either
    nobody = db.acting_as(Caller(sees_all=False))
    assert reads.list_jobs(nobody) == []
    with pytest.raises(NotFound):
        reads.get_job(nobody, job.id)


def test_a_job_that_is_not_there_is_not_found(db: Database) -> None:
    with pytest.raises(NotFound) as refused:
        reads.get_job(db, "0" * 32)
    assert (refused.value.status, refused.value.code) == (404, "job_not_found")


def test_pages_go_from_new_to_old_and_inserts_do_not_shift_them(db: Database) -> None:
    old = [submit(db).id for _ in range(7)]
    seen: list[str] = []
    before = None
    while page := reads.list_jobs(db, before=before, limit=3):
        seen += [job.id for job in page]
        before = page[-1].seq
        submit(db)
    assert seen == old[::-1]


def test_jobs_are_listed_by_status_and_tag(db: Database) -> None:
    plain = submit(db)
    tagged = submit(db, tags={"course": "nlp-101", "a.b-c_d": "x:y"})
    queue.request_cancel(db, plain.id)

    def listed(**by: Any) -> list[str]:
        return [job.id for job in reads.list_jobs(db, reads.JobFilter(**by))]

    assert listed() == [tagged.id, plain.id]
    assert listed(status="cancelled") == [plain.id]
    assert listed(status="queued") == [tagged.id]
    assert listed(status="running") == []
    assert listed(tag=("course", "nlp-101")) == [tagged.id]
    assert listed(tag=("course", None)) == [tagged.id]
    assert listed(tag=("a.b-c_d", "x:y")) == [tagged.id]
    assert listed(tag=("course", "nlp-102")) == listed(tag=("other", None)) == []


def test_jobs_are_listed_in_the_order_of_their_submission_whatever_their_ids(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(("c" * 32, "a" * 32, "b" * 32))  # two processes, or a clock that was set back
    monkeypatch.setattr("service.jobs.submit.new_id", lambda: next(ids))
    jobs = [submit(db) for _ in range(3)]
    listed = [job.id for job in reads.list_jobs(db)]
    assert listed == ["b" * 32, "a" * 32, "c" * 32]
    assert [job.id for job in reads.list_jobs(db, before=jobs[1].seq)] == ["c" * 32]


def test_a_list_has_the_figures_of_the_newest_checkpoints_and_reads_no_reconstruction(db: Database) -> None:
    waiting = submit(db)
    queue.request_pause(db, waiting.id)
    worker = WorkerIdentity()
    done = finished(db, worker, (0, 50, 25))
    statements: list[str] = []

    @sa.event.listens_for(db.engine, "before_cursor_execute")
    def keep(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    try:
        listed = reads.list_measured_jobs(db)
    finally:
        sa.event.remove(db.engine, "before_cursor_execute", keep)
    assert [(job.id, figures) for job, figures in listed] == [
        (done.id, reads.NewestFigures(50, 1.5, None)),
        (waiting.id, None),
    ]
    (query,) = [statement for statement in statements if "SELECT" in statement]
    assert "reconstruction" not in query
    assert [job.id for job, _ in reads.list_measured_jobs(db, reads.JobFilter(status="paused"), limit=1)] == [
        waiting.id
    ]
    assert [job.id for job, _ in reads.list_measured_jobs(db, before=done.seq)] == [waiting.id]


def test_jobs_are_counted_by_status(db: Database) -> None:
    assert reads.count_jobs(db) == dict.fromkeys(STATUSES, 0)
    submit(db)
    queue.request_pause(db, submit(db).id)
    assert reads.count_jobs(db) == dict.fromkeys(STATUSES, 0) | {"queued": 1, "paused": 1}


def test_jobs_are_found_by_a_part_of_their_name_or_the_beginning_of_an_id(db: Database) -> None:
    plain, named, percent = submit(db), submit(db, name="Dropout 0.2"), submit(db, name="100 %")

    def found(q: str) -> list[str]:
        return [job.id for job in reads.list_jobs(db, reads.JobFilter(q=q))]

    assert found("drop") == found("OUT 0") == [named.id]
    assert found("%") == [percent.id], "a sign of the query language is a sign like any other"
    assert found(plain.id.upper()) == [plain.id]
    assert found(plain.id[1:]) == found("_") == []
    queue.request_cancel(db, named.id)
    assert reads.count_jobs(db, reads.JobFilter(q="drop")) == dict.fromkeys(STATUSES, 0) | {"cancelled": 1}


def test_a_text_is_found_by_its_hash(db: Database) -> None:
    assert reads.get_text(db, submit(db, text="olá").text_sha256) == "olá".encode()
    with pytest.raises(NotFound) as refused:
        reads.get_text(db, "0" * 64)
    assert refused.value.code == "text_not_found"


def test_checkpoints_are_listed_by_percent(db: Database) -> None:
    job = finished(db, WorkerIdentity(), (50, 0, 100))
    assert [found.percent for found in reads.list_checkpoints(db, job.id)] == [0, 50, 100]
    newest = reads.get_checkpoint(db, job.id, "latest")
    assert (newest.percent, newest.step, newest.epoch, newest.metrics) == (100, 100, 50.0, {"loss": 1.5})
    assert newest.files == [{"name": "config.json", "size": 2, "sha256": "s"}]
    assert reads.get_checkpoint(db, job.id, 0).percent == 0


def test_a_checkpoint_that_is_not_there_is_told_from_a_job_that_is_not(db: Database) -> None:
    job = submit(db)
    for job_id, percent, code in (
        (job.id, 25, "checkpoint_not_found"),
        (job.id, "latest", "checkpoint_not_found"),
        ("0" * 32, "latest", "job_not_found"),
    ):
        with pytest.raises(NotFound) as refused:
            reads.get_checkpoint(db, job_id, percent)  # type: ignore[arg-type]
        assert refused.value.code == code
    assert reads.list_checkpoints(db, job.id) == []
    with pytest.raises(NotFound):
        reads.list_checkpoints(db, "0" * 32)
