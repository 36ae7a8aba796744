"""The fence: writes of the worker that holds the lease, and of one that has lost it, on SQLite and on PostgreSQL."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from service.database.database import Database
from service.errors import LeaseLost
from service.jobs import queue, reads, recording
from service.jobs.lease import Claim, Intents, renew_lease
from service.jobs.workers import WorkerIdentity, worker_seen
from tests.databases import Clock
from tests.queued import (
    CHECKPOINT,
    LEASE,
    STEPS,
    claim,
    everything,
    out_of_memory,
    prepare,
    running,
)

WRITES: dict[str, Callable[[Database, Claim], object]] = {
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
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@every_write
def test_the_worker_that_holds_the_lease_may_write(
    db: Database, worker: WorkerIdentity, write: Callable[[Database, Claim], object]
) -> None:
    held = running(db, worker)
    before = everything(db)
    write(db, held)
    assert everything(db) != before


@every_write
def test_a_worker_with_a_stale_claim_writes_nothing(
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


def test_without_the_fence_a_stale_worker_would_overwrite(
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
