"""What the owner of a running job writes, up to the job's end, on SQLite and on PostgreSQL."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.database.database import Database
from service.database.schema import table
from service.errors import Conflict, LeaseLost
from service.jobs import queue, reads, recording
from service.jobs.lease import Claim, Intents, renew_lease
from service.jobs.tables import Job
from service.jobs.workers import WorkerIdentity, worker_seen
from tests.databases import Clock
from tests.queued import CHECKPOINT, LEASE, STEPS, claim, everything, running, statuses
from tests.races import Races

EXECUTION = {"device": "cpu", "micro_batch": 8}


def prepare(db: Database, held: Claim) -> None:
    model = {"n_params": 1, "n_active_params": 1}
    recording.record_prepared(db, held, execution=EXECUTION, n_tokens=9, total_steps=4, model=model)


def out_of_memory(db: Database, held: Claim) -> Job:
    prepare(db, held)
    return queue.release_out_of_memory(
        db, held, micro_batch=4, reason="memory ran out", warnings=[{"code": "a"}, {"code": "b"}]
    )


OWNERS_WRITES: dict[str, Callable[[Database, Claim], object]] = {
    "heartbeat": lambda db, claim: recording.heartbeat(db, claim, {"step": 7}),
    "prepared": lambda db, claim: prepare(db, claim),
    "steps": lambda db, claim: recording.record_steps(db, claim, STEPS, {"step": 2}),
    "checkpoint": lambda db, claim: recording.record_checkpoint(db, claim, percent=0, **CHECKPOINT),
    "snapshot": lambda db, claim: recording.record_snapshot(db, claim, step=1, folder="s", manifest_sha256="m"),
    "event": lambda db, claim: recording.record_event(db, claim, "warning", {"code": "w", "message": "m"}),
    "micro-batch": lambda db, claim: (prepare(db, claim), recording.record_micro_batch(db, claim, 2)),
    "rewind": lambda db, claim: recording.rewind(db, claim, 0),
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
    worker_seen(db, worker.id)
    assert [job.id for job in queue.rescue(db)] == [stale.job_id]
    fresh = claim(db, worker)
    assert (fresh.job_id, fresh.fence) == (stale.job_id, stale.fence + 1)
    recording.record_steps(db, fresh, STEPS)
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

    def renew_without_fence(db: Database, session: Any, held: Claim, **values: Any) -> Any:
        current = held.job.model_copy(update={"fence": reads.load_job(session, held.job_id).fence})
        return renew_lease(db, session, replace(held, job=current), **values)

    monkeypatch.setattr(queue, "renew_lease", renew_without_fence)
    queue.finish(db, stale, "failed", error={"code": "stale", "message": "an old result"})
    monkeypatch.undo()
    with pytest.raises(LeaseLost):
        queue.finish(db, fresh, "succeeded")
    assert reads.get_job(db, fresh.job_id).status == "failed"


def test_a_heartbeat_renews_the_lease_and_keeps_the_progress(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    clock.advance(50)
    recording.heartbeat(db, held, {"step": 3})
    clock.advance(50)
    assert recording.heartbeat(db, held) == Intents(cancel=False, pause=False)
    job = reads.get_job(db, held.job_id)
    assert job.lease_until == clock.now + timedelta(seconds=LEASE)
    assert job.progress == {"step": 3}
    assert queue.rescue(db) == []


def test_what_the_first_start_decided_stays(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker, warnings=[{"code": "known", "message": "from the config"}])
    first = {"execution": {"device": "cpu"}, "n_tokens": 9, "total_steps": 4}
    model = {"n_params": 5, "n_active_params": 3}
    recording.record_prepared(db, held, **first, model=model, warnings=[{"code": "new", "message": "m"}])
    queue.release(db, held)
    again = claim(db, worker)
    assert again.job.execution == {"device": "cpu"}
    repeated = [{"code": "known", "message": "from the config"}, {"code": "new", "message": "otherwise"}]
    recording.record_prepared(db, again, **first | {"execution": {"device": "cuda"}}, model=model, warnings=repeated)
    job = reads.get_job(db, held.job_id)
    assert job.execution == {"device": "cpu"}
    assert (job.n_tokens, job.total_steps, job.n_params, job.n_active_params) == (9, 4, 5, 3)
    assert job.warnings == [{"code": "known", "message": "from the config"}, {"code": "new", "message": "m"}]
    events = reads.events_after(db, held.job_id, 0)
    warned = [event.data for event in events if event.kind == "warning"]
    assert warned == [{"code": "new", "message": "m"}, {"code": "new", "message": "otherwise"}]
    assert [event.seq for event in events] == list(range(1, job.event_seq + 1))


def test_a_job_that_needed_fewer_steps_says_why_in_its_row_and_its_last_event(
    db: Database, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    job = queue.finish(db, held, "succeeded", reason="stopped early at step 42: perplexity 1.987")
    last = reads.events_after(db, held.job_id, 0)[-1]
    assert job.status_reason == last.data["status_reason"] == "stopped early at step 42: perplexity 1.987"


def test_what_a_config_warns_of_is_what_it_does_once_the_text_is_tokenised(
    db: Database, worker: WorkerIdentity
) -> None:
    outdated = [{"code": code, "message": "of 9 tokens"} for code in ("warmup_beyond_end", "prefix_longer_than_text")]
    held = running(db, worker, warnings=[*outdated, {"code": "upcycle_not_equal", "message": "of the parent"}])
    current = {"code": "warmup_beyond_end", "message": "of 12 tokens"}
    decided = {"execution": EXECUTION, "n_tokens": 12, "total_steps": 4, "model": {"n_params": 1, "n_active_params": 1}}
    for _ in range(2):
        recording.record_prepared(db, held, **decided, warnings=[current])
        job = reads.get_job(db, held.job_id)
        assert job.warnings == [{"code": "upcycle_not_equal", "message": "of the parent"}, current]
        assert job.n_tokens == 12


def test_what_the_memory_does_not_hold_is_known_to_every_later_attempt(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    prepare(db, held)
    recording.record_micro_batch(db, held, 6)
    job = out_of_memory(db, held)
    assert (job.status, job.status_reason, job.crashes) == ("queued", "memory ran out", 0)
    assert [event.data["code"] for event in reads.events_after(db, job.id, 0) if event.kind == "warning"] == ["a", "b"]
    again = claim(db, worker)
    assert again.job.execution == {"device": "cpu", "micro_batch": 4}
    prepare(db, again)
    assert reads.get_job(db, job.id).execution == {"device": "cpu", "micro_batch": 4}


@pytest.mark.parametrize(("ask", "status"), [(queue.request_cancel, "cancelled"), (queue.request_pause, "paused")])
def test_a_job_that_ran_out_of_memory_obeys_what_was_asked_of_its_owner(
    db: Database, worker: WorkerIdentity, ask: Callable[[Database, str], Job], status: str
) -> None:
    held = running(db, worker)
    ask(db, held.job_id)
    assert out_of_memory(db, held).status == status


def test_a_checkpoint_written_again_replaces_its_row(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_checkpoint(db, held, percent=25, **CHECKPOINT)
    recording.record_checkpoint(db, held, percent=25, **CHECKPOINT | {"folder": "newer", "metrics": {"loss": 1.0}})
    (found,) = reads.list_checkpoints(db, held.job_id)
    assert (found.folder, found.metrics, found.fence) == ("newer", {"loss": 1.0}, 1)


def test_a_job_has_one_snapshot_the_newest(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    for step in (10, 20):
        recording.record_snapshot(db, held, step=step, folder=f"s{step}", manifest_sha256="m")
    found = reads.find_snapshot(db, held.job_id)
    assert found is not None
    assert (found.step, found.folder) == (20, "s20")


def test_an_ended_job_has_no_snapshot(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_snapshot(db, held, step=1, folder="s1", manifest_sha256="m")
    queue.finish(db, held, "succeeded")
    assert reads.find_snapshot(db, held.job_id) is None


def test_rewinding_forgets_the_steps_past_the_snapshot(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_steps(db, held, STEPS)
    recording.record_snapshot(db, held, step=2, folder="s2", manifest_sha256="m")
    recording.rewind(db, held, 1)
    assert reads.series(db, held.job_id)["step"] == [1]
    assert reads.find_snapshot(db, held.job_id) is None


def test_events_are_numbered_without_a_gap(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_event(db, held, "warning", {"code": "w", "message": "m"})
    recording.record_checkpoint(db, held, percent=0, **CHECKPOINT)
    recording.heartbeat(db, held)
    queue.finish(db, held, "succeeded")
    events = reads.events_after(db, held.job_id, 0)
    assert [(event.seq, event.kind) for event in events] == [
        (1, "status"), (2, "status"), (3, "warning"), (4, "checkpoint"), (5, "status"),
    ]  # fmt: skip
    assert [event.seq for event in reads.events_after(db, held.job_id, 3, limit=1)] == [4]
    assert reads.get_job(db, held.job_id).event_seq == 5


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
