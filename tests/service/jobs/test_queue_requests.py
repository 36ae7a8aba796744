"""Cancel, pause and resume, on SQLite and on PostgreSQL."""

from collections.abc import Callable

import pytest

from service.database.database import Database
from service.errors import Conflict, NotFound
from service.jobs import queue, reads, recording
from service.jobs.lease import Intents
from service.jobs.queue_position import find_queue_position
from service.jobs.tables import Job
from service.jobs.workers import WorkerIdentity
from tests.queued import LEASE, STEPS, claim, everything, running, statuses, submit
from tests.races import Races


def test_a_waiting_job_is_cancelled_at_once(db: Database, worker: WorkerIdentity) -> None:
    job = submit(db)
    assert queue.request_cancel(db, job.id).status == "cancelled"
    assert queue.claim(db, worker, LEASE) is None
    assert statuses(db, job.id) == ["queued", "cancelled"]


def test_a_paused_job_is_cancelled_at_once(db: Database) -> None:
    job = submit(db)
    queue.request_pause(db, job.id)
    assert queue.request_cancel(db, job.id).status == "cancelled"


@pytest.mark.parametrize("waits", ["paused", "queued"])
def test_a_job_that_is_cancelled_while_it_waits_leaves_no_snapshot(
    db: Database, worker: WorkerIdentity, waits: str
) -> None:
    held = running(db, worker)
    recording.record_snapshot(db, held, step=1, folder="f", manifest_sha256="m")
    if waits == "paused":
        queue.request_pause(db, held.job_id)
    assert queue.release(db, held).status == waits
    assert reads.find_snapshot(db, held.job_id) is not None
    queue.request_cancel(db, held.job_id)
    assert reads.find_snapshot(db, held.job_id) is None


def test_the_worker_of_a_running_job_is_asked_to_cancel(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    assert queue.request_cancel(db, held.job_id).status == "running"
    assert recording.heartbeat(db, held) == Intents(cancel=True, pause=False)
    assert recording.record_steps(db, held, STEPS).cancel
    assert queue.release(db, held).status == "cancelled"


def test_a_waiting_job_is_paused_and_goes_on_in_its_old_place(db: Database, worker: WorkerIdentity) -> None:
    first, second = submit(db), submit(db)
    paused = queue.request_pause(db, first.id)
    assert (paused.status, paused.pause_requested_at) == ("paused", None)
    assert paused.status_reason is not None
    place = find_queue_position(db, second.id)
    assert place is not None
    assert place.position == 0
    resumed = queue.resume(db, first.id)
    assert (resumed.status, resumed.status_reason) == ("queued", None)
    assert claim(db, worker).job_id == first.id
    assert statuses(db, first.id) == ["queued", "paused", "queued", "running"]


def test_the_worker_of_a_running_job_is_asked_to_pause(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    assert queue.request_pause(db, held.job_id).status == "running"
    assert recording.heartbeat(db, held) == Intents(cancel=False, pause=True)
    job = queue.release(db, held)
    assert (job.status, job.pause_requested_at, job.lease_until) == ("paused", None, None)
    assert queue.resume(db, job.id).status == "queued"
    assert claim(db, worker).fence == held.fence + 1


def test_cancel_beats_pause(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    queue.request_cancel(db, held.job_id)
    queue.request_pause(db, held.job_id)
    assert queue.release(db, held).status == "cancelled"


def test_a_resume_before_the_worker_has_paused_keeps_the_queue_position(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    queue.request_pause(db, held.job_id)
    assert recording.heartbeat(db, held).pause
    resume = races.hold(queue.resume, db, held.job_id)
    step_to_paused = races.start(queue.release, db, held)
    assert resume.let_go().status == "running"
    assert step_to_paused.result().status == "queued"


def test_a_resume_after_the_worker_has_paused_queues_the_job(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    queue.request_pause(db, held.job_id)
    step_to_paused = races.hold(queue.release, db, held)
    resume = races.start(queue.resume, db, held.job_id)
    assert step_to_paused.let_go().status == "paused"
    assert resume.result().status == "queued"


def test_a_cancel_that_meets_a_claim_reaches_the_new_worker(db: Database, worker: WorkerIdentity, races: Races) -> None:
    job = submit(db)
    claiming = races.hold(queue.claim, db, worker, LEASE)
    cancel = races.start(queue.request_cancel, db, job.id)
    held = claiming.let_go()
    assert cancel.result().status == "running"
    assert held is not None
    assert recording.heartbeat(db, held).cancel


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
