"""How a running job ends, on SQLite and on PostgreSQL."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.database.database import Database
from service.database.schema import table
from service.errors import Conflict
from service.jobs import queue, reads, recording
from service.jobs.tables import Job
from service.jobs.workers import WorkerIdentity
from tests.databases import Clock
from tests.queued import (
    out_of_memory,
    running,
    statuses,
)
from tests.races import Races


def test_a_job_succeeds(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    clock.advance(9)
    job = queue.finish(db, held, "succeeded", progress={"percent": 100})
    assert (job.status, job.finished_at, job.lease_until, job.error) == ("succeeded", clock.now, None, None)
    assert job.progress == {"percent": 100}
    assert reads.get_job(db, job.id) == job
    assert statuses(db, job.id) == ["queued", "running", "succeeded"]


def test_a_job_fails_with_a_reason(db: Database, worker: WorkerIdentity) -> None:
    error = {"code": "loss_not_finite", "message": "step 3"}
    job = queue.finish(db, running(db, worker), "failed", error=error)
    assert (job.status, job.error) == ("failed", error)


def test_a_job_that_needed_fewer_steps_says_why_in_its_row_and_its_last_event(
    db: Database, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    job = queue.finish(db, held, "succeeded", reason="stopped early at step 42: perplexity 1.987")
    last = reads.events_after(db, held.job_id, 0)[-1]
    assert job.status_reason == last.data["status_reason"] == "stopped early at step 42: perplexity 1.987"


@pytest.mark.parametrize(("ask", "status"), [(queue.request_cancel, "cancelled"), (queue.request_pause, "paused")])
def test_a_job_that_ran_out_of_memory_does_what_users_requested(
    db: Database, worker: WorkerIdentity, ask: Callable[[Database, str], Job], status: str
) -> None:
    held = running(db, worker)
    ask(db, held.job_id)
    assert out_of_memory(db, held).status == status


def test_an_ended_job_has_no_snapshot(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_snapshot(db, held, step=1, folder="s1", manifest_sha256="m")
    queue.finish(db, held, "succeeded")
    assert reads.find_snapshot(db, held.job_id) is None


def test_a_finish_that_commits_first_beats_a_cancel(db: Database, worker: WorkerIdentity, races: Races) -> None:
    held = running(db, worker)
    finish = races.hold(queue.finish, db, held, "succeeded")
    cancel = races.start(queue.request_cancel, db, held.job_id)
    assert finish.let_go().status == "succeeded"
    with pytest.raises(Conflict) as refused:
        cancel.result()
    assert refused.value.code == "not_cancellable"
    assert reads.get_job(db, held.job_id).cancel_requested_at is None


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
    assert reads.get_job(db, held.job_id) == held.job
