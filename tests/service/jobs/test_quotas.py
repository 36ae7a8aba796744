"""Quotas hold whatever happens at once, on SQLite and on PostgreSQL."""

from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa

from service.access.keys import create_key
from service.access.quotas import Quotas
from service.database.caller import Caller
from service.database.database import Database
from service.errors import QuotaExceeded
from service.jobs import queue, reads, recording
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.quotas import find_waiting_reasons, usage_of
from service.jobs.submit import submit_job, submit_sweep
from service.jobs.workers import WorkerIdentity
from tests.databases import ONLY_POSTGRESQL, Clock
from tests.queued import CHECKPOINT, LEASE, claim, submit
from tests.races import Races, at_once

NEW = NewJob(text="a b", config={})


def owned(db: Database, owner: str = "ana", **quotas: Any) -> Database:
    """The database as a member with these quotas sees it."""
    made = create_key(db, owner, "member", quotas=Quotas(**quotas))
    return db.acting_as(Caller(owner, sees_all=False, key_id=made.id))


def refused(call: Any, *arguments: Any) -> tuple[str, float, float]:
    with pytest.raises(QuotaExceeded) as error:
        call(*arguments)
    assert (error.value.status, error.value.code) == (429, "quota_exceeded")
    return error.value.name, error.value.limit, error.value.left


def test_waiting_jobs_are_counted_queued_or_paused_and_a_sweep_whole(db: Database) -> None:
    ana, rui = owned(db, queued_jobs=3), owned(db, "rui")
    first, _ = submit_job(ana, NEW)
    queue.request_pause(ana, first.id)
    sweep = NewSweep(jobs=[NEW] * 3, config={}, parameters=[])
    assert refused(submit_sweep, ana, sweep) == ("queued_jobs", 3, 2)
    submit_sweep(ana, NewSweep(jobs=[NEW] * 2, config={}, parameters=[]))
    assert refused(submit_job, ana, NEW) == ("queued_jobs", 3, 0)
    submit_sweep(rui, sweep)
    queue.request_cancel(ana, first.id)
    submit_job(ana, NEW)


def test_of_many_submits_at_once_no_more_pass_than_the_quota_has_left(db: Database) -> None:
    ana = owned(db, queued_jobs=3)

    def try_to_submit() -> bool:
        try:
            submit_job(ana, NEW)
        except QuotaExceeded:
            return False
        return True

    assert sum(at_once([try_to_submit] * 12)) == 3


def test_a_repeated_submit_takes_no_quota(db: Database) -> None:
    ana = owned(db, queued_jobs=1)
    new = NewJob(text="a b", config={}, idempotency_key="k")
    first, _ = submit_job(ana, new)
    assert submit_job(ana, new) == (first, False)


def test_further_jobs_wait_while_as_many_run_as_may_and_others_pass(db: Database, worker: WorkerIdentity) -> None:
    ana = owned(db, running_jobs=1)
    first, second = (submit_job(ana, NEW)[0] for _ in range(2))
    nobodys = submit(db)
    running = claim(db, worker)
    assert running.job_id == first.id
    assert claim(db, worker).job_id == nobodys.id
    assert queue.claim(db, worker, LEASE) is None
    queue.finish(db, running, "succeeded")
    assert claim(db, worker).job_id == second.id


def test_a_job_that_waits_for_a_quota_says_which(db: Database, worker: WorkerIdentity, clock: Clock) -> None:
    ana, rui = owned(db, running_jobs=1), owned(db, "rui", device_seconds_per_day=5)
    first, second = (submit_job(ana, NEW)[0] for _ in range(2))
    ruis = [submit_job(rui, NEW)[0] for _ in range(2)]

    def reasons() -> dict[str, str]:
        return find_waiting_reasons(db, [reads.get_job(db, job.id) for job in (first, second, *ruis)])

    assert reasons() == {}
    held = [claim(db, worker), claim(db, worker)]
    assert {one.job_id for one in held} == {first.id, ruis[0].id}
    waits = {second.id: "waiting: as many of the owner's jobs run as the quota running_jobs allows"}
    assert reasons() == waits
    clock.advance(6)
    assert reasons() == waits | {ruis[1].id: "waiting: the owner's quota device_seconds_per_day is used up"}
    queue.finish(db, next(one for one in held if one.job_id == first.id), "succeeded")
    assert list(reasons()) == [ruis[1].id]


def test_two_workers_that_claim_at_once_do_not_pass_the_limit(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    ana = owned(db, running_jobs=1)
    first, second = (submit_job(ana, NEW)[0] for _ in range(2))
    held = races.hold(queue.claim, db, worker, LEASE)
    other = races.start(queue.claim, db, worker, LEASE)
    claimed = held.let_go()
    assert claimed is not None
    assert claimed.job_id == first.id
    assert other.result(30) is None
    queue.finish(db, claimed, "succeeded")
    assert claim(db, worker).job_id == second.id


def test_of_a_batch_those_past_a_quota_keep_their_place_and_nothing_is_rolled_back(
    db: Database, worker: WorkerIdentity
) -> None:
    ana = owned(db, running_jobs=2)
    anas = [submit_job(ana, NEW)[0].id for _ in range(4)]
    urgent = submit_job(ana, NewJob(text="a b", config={}, priority=1))[0].id
    nobodys, rui = submit(db).id, submit_job(owned(db, "rui"), NEW)[0].id
    rolled_back: list[bool] = []
    sa.event.listen(db.engine, "rollback", lambda found: rolled_back.append("writes" in found.get_execution_options()))
    claimed = queue.claim_jobs(db, worker, LEASE, 6)
    assert [held.job_id for held in claimed] == [urgent, anas[0], nobodys]
    assert [held.job_id for held in queue.claim_jobs(db, worker, LEASE, 6)] == [rui]
    assert queue.claim_jobs(db, worker, LEASE, 6) == []
    queue.finish(db, claimed[0], "succeeded")
    assert [held.job_id for held in queue.claim_jobs(db, worker, LEASE, 6)] == [anas[1]]
    assert not any(rolled_back)
    assert [reads.get_job(db, job_id).status for job_id in anas[2:]] == ["queued"] * 2


def test_workers_that_claim_batches_at_once_stay_within_a_quota_and_leave_nobody_else_waiting(
    db: Database, worker: WorkerIdentity
) -> None:
    ana, rui = owned(db, running_jobs=3), owned(db, "rui", running_jobs=3)
    for owner in (ana, rui):
        for _ in range(8):
            submit_job(owner, NEW)
    nobodys = {submit(db).id for _ in range(8)}

    def until_there_are_none() -> list[Claim]:
        found = []
        while more := queue.claim_jobs(db, worker, LEASE, 5):
            found += more
        return found

    claimed = [held for found in at_once([until_there_are_none] * 4) for held in found]
    claimed += until_there_are_none()
    assert Counter(held.job.owner for held in claimed) == {"ana": 3, "rui": 3, "": 8}
    assert nobodys <= {held.job_id for held in claimed}


@ONLY_POSTGRESQL  # SQLite has one writer, which looks after the other's commit
def test_a_batch_that_another_was_faster_than_looks_again_and_takes_what_others_have(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    ana = owned(db, running_jobs=2)
    anas = [submit_job(ana, NEW)[0].id for _ in range(6)]
    nobodys = submit(db).id
    faster = races.hold(queue.claim_jobs, db, worker, LEASE, 2)
    slower = races.start(queue.claim_jobs, db, worker, LEASE, 5)
    assert [held.job_id for held in faster.let_go()] == anas[:2]
    assert [held.job_id for held in slower.result(30)] == [nobodys]


def test_seconds_on_a_device_are_counted_over_a_day_and_outlive_the_job(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    ana = owned(db, device_seconds_per_day=100)
    first, second = (submit_job(ana, NEW)[0] for _ in range(2))
    running = claim(db, worker)
    clock.advance(40)
    queue.release(db, running)  # the next attempt goes on
    clock.advance(1000)
    running = claim(db, worker)
    assert running.job_id == first.id
    clock.advance(60)
    assert usage_of(ana, "ana") == [("device_seconds_per_day", 100, 100)]
    queue.finish(db, running, "succeeded")
    queue.delete(ana, first.id)
    assert queue.claim(db, worker, LEASE) is None
    assert refused(submit_job, ana, NEW) == ("device_seconds_per_day", 100, 0)
    clock.advance(24 * 3600 + 10 - 1100)  # of the first attempt 10 seconds are older than a day then
    assert usage_of(ana, "ana") == [("device_seconds_per_day", 100, 90)]
    assert claim(db, worker).job_id == second.id


def test_stored_bytes_are_texts_once_each_and_checkpoints(db: Database, worker: WorkerIdentity) -> None:
    ana = owned(db, bytes_stored=1000)
    text = NewJob(text="a" * 100, config={})
    submit_job(ana, text)
    submit_job(ana, text)
    assert usage_of(ana, "ana") == [("bytes_stored", 1000, 100)]
    files = [{"name": name, "size": 400, "sha256": ""} for name in "ab"]
    recording.record_checkpoint(db, claim(db, worker), **{**CHECKPOINT, "percent": 0, "files": files})
    assert usage_of(ana, "ana") == [("bytes_stored", 1000, 900)]
    assert refused(submit_job, ana, NewJob(text="b" * 101, config={})) == ("bytes_stored", 1000, 100)
    submit_job(ana, NewJob(text="b" * 50, config={}))
    submit_job(ana, text)  # is stored already
    submit_job(ana, NewJob(text="c" * 50, config={}))
    assert refused(submit_job, ana, text) == ("bytes_stored", 1000, 0)


def test_a_second_key_neither_doubles_a_quota_nor_changes_the_others(db: Database) -> None:
    ana = owned(db, queued_jobs=1, running_jobs=5)
    submit_job(ana, NEW)
    again = owned(db, queued_jobs=2)
    submit_job(again, NEW)
    assert refused(submit_job, ana, NEW) == ("queued_jobs", 2, 0)
    assert usage_of(ana, "ana") == [("queued_jobs", 2, 2), ("running_jobs", 5, 0)]


@pytest.mark.parametrize("given", ["queued_jobs", "nope=1", "queued_jobs=-1", "queued_jobs=x", "bytes_stored=inf"])
def test_a_quota_that_is_not_one_is_named(given: str) -> None:
    with pytest.raises(ValueError, match=given.partition("=")[0]):
        Quotas.parse([given])


def test_quotas_are_given_by_name() -> None:
    parsed = Quotas.parse(["queued_jobs=10", "device_seconds_per_day=3600.5"])
    assert parsed.given == {"queued_jobs": 10, "device_seconds_per_day": 3600.5}
