"""The fence: writes of the worker that holds the lease, and of one that has lost it, on SQLite and on PostgreSQL."""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from service.database.database import Database
from service.errors import LeaseLost
from service.jobs import queue, reads, recording
from service.jobs.claim_order import jobs
from service.jobs.lease import Claim, Intents
from service.jobs.queue import Finish, Release
from service.jobs.recording import Report
from service.jobs.tables import Job
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
from tests.races import Races

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

    monkeypatch.setattr(queue, "HOLDS", jobs.c.id == stale.job_id)
    monkeypatch.setattr(queue, "_finishing", queue._finishing.__wrapped__)  # built anew
    with suppress(LeaseLost):  # its outcome is found by the fence, too
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


# Several jobs of a worker at once


def held_and_lost(db: Database, clock: Clock, worker: WorkerIdentity) -> tuple[list[Claim], Claim, Claim]:
    """Two claims that hold, and two of one job: the lost one, and the one by which the same worker got it again."""
    lost = running(db, worker)
    clock.advance(LEASE + 1)
    worker_seen(db, worker.id)
    queue.rescue(db)
    again = claim(db, worker)
    assert again.job_id == lost.job_id
    return [running(db, worker), running(db, worker)], lost, again


BATCHES: dict[str, Callable[[Database, list[Claim]], list[Any]]] = {
    "reports": lambda db, claims: recording.record_reports(
        db, [Report(claim, STEPS | {"train_loss": [claim.fence] * 2}, {"step": claim.fence}) for claim in claims]
    ),
    "releases": lambda db, claims: queue.release_jobs(
        db, [Release(one, pause_reason=f"{one.fence}") for one in claims]
    ),
    "heartbeats": lambda db, claims: recording.record_reports(db, [Report(claim) for claim in claims]),
    "ends": lambda db, claims: queue.finish_jobs(
        db,
        [
            Finish(one, "failed", error={"code": "c", "message": f"{one.fence}"}) if number % 2
            else Finish(one, "succeeded", reason=f"{one.fence}", progress={"step": one.fence})
            for number, one in enumerate(claims)
        ],
    ),
}  # fmt: skip
every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


@every_batch
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_in_a_batch_a_lost_lease_drops_that_claim_alone(
    db: Database,
    clock: Clock,
    worker: WorkerIdentity,
    batch: Callable[[Database, list[Claim]], list[Any]],
    place: int,
) -> None:
    held, lost, again = held_and_lost(db, clock, worker)
    clock.advance(9)
    claims = [*held, again]
    claims.insert(place, lost)
    outcomes = batch(db, claims)
    assert [isinstance(outcome, LeaseLost) for outcome in outcomes] == [one is lost for one in claims]
    for one, outcome in zip(claims, outcomes, strict=True):
        row = reads.get_job(db, one.job_id)
        if one is lost:
            assert str(lost.fence) in str(outcome)
        elif isinstance(outcome, Job):
            assert outcome == row
            assert (row.status_reason, row.error and row.error["message"]).count(str(one.fence)) == 1
            assert reads.events_after(db, row.id, 0)[-1].data["status"] == row.status
        else:
            assert row.lease_until == clock.now + timedelta(seconds=LEASE)
            assert set(reads.series(db, row.id)["train_loss"]) <= {float(one.fence)}
            assert row.progress.get("step", one.fence) == one.fence


def test_a_batch_that_has_lost_every_lease_writes_nothing(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker), running(db, worker)
    queue.finish_jobs(db, [Finish(one, "succeeded") for one in held])
    before = everything(db)
    for batch in BATCHES.values():
        assert all(isinstance(outcome, LeaseLost) for outcome in batch(db, list(held)))
    assert everything(db) == before


def test_each_job_of_a_batch_hears_its_own_requests(db: Database, worker: WorkerIdentity) -> None:
    cancelled, paused, undisturbed = (running(db, worker) for _ in range(3))
    queue.request_cancel(db, cancelled.job_id)
    queue.request_pause(db, paused.job_id)
    claims = [cancelled, undisturbed, paused]
    heard = recording.record_reports(db, [Report(one) for one in claims])
    assert heard == [Intents(True, False), Intents(False, False), Intents(False, True)]
    ended = queue.finish_jobs(db, [Finish(one, "failed", error={"code": "c", "message": "m"}) for one in claims])
    assert [(job.status, job.error is None) for job in ended if isinstance(job, Job)] == [
        ("cancelled", True), ("failed", False), ("failed", False),
    ]  # fmt: skip


def test_batches_of_the_same_jobs_in_opposite_orders_do_not_block_each_other(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    """A cancel of all holds the rows; two batches wait for them, in opposite orders, and then each other's."""
    claims = [running(db, worker) for _ in range(4)]
    first = races.hold(recording.record_reports, db, [Report(one) for one in claims])
    others = [
        races.start(recording.record_reports, db, [Report(one) for one in order])
        for order in (claims[::-1], claims, claims[::-1])
    ]
    for outcome in (first.let_go(), *(other.result(30) for other in others)):
        assert outcome == [Intents(False, False)] * 4


def test_a_cancel_that_meets_a_batch_of_ends_loses_or_wins_for_each_job(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    one, other = running(db, worker), running(db, worker)
    cancelling = races.hold(queue.request_cancel, db, other.job_id)
    ending = races.start(queue.finish_jobs, db, [Finish(one, "succeeded"), Finish(other, "succeeded")])
    cancelling.let_go()
    assert [job.status for job in ending.result() if isinstance(job, Job)] == ["succeeded", "cancelled"]
