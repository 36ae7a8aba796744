"""Which jobs one claim takes together, and what becomes of each."""

import threading
from collections.abc import Callable, Set
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from nanomoe.cohort_shape import MOST_WORK, cohort_key
from nanomoe.config import JobConfig
from service.access.keys import create_key
from service.access.quotas import Quotas
from service.database.caller import Caller
from service.database.database import Database
from service.database.schema import table
from service.errors import LeaseLost, SchemaMismatch
from service.jobs import cohorts as cohorts_module
from service.jobs import queue, reads, recording, sweeps
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.queue import Release
from service.jobs.submit import submit_sweep
from service.jobs.tables import Job
from service.jobs.workers import WorkerIdentity, worker_stopped
from tests.databases import ONLY_POSTGRESQL, Clock
from tests.queued import CHECKPOINT, LEASE, STEPS, claim, copy_job, release_from_company, statuses, submit
from tests.races import TIMEOUT_SECONDS, Races, at_once
from tests.service.jobs.test_queue_claim import plans_of
from tests.service.jobs.test_queue_histories import OWNERS_WRITES


def member(db: Database, **changes: Any) -> str:
    return submit(db, **{"cohort_key": "shape", "total_steps": 100} | changes).id


def cohorts(db: Database, worker: WorkerIdentity, n: int = 1, width: int = 64) -> list[list[str]]:
    found = queue.claim_cohorts(db, worker, LEASE, n, width)
    return [[held.job_id for held in one] for one in found]


# Shapes


BYTES = JobConfig(tokenizer="bytes", block_size=32, n_layer=1, n_head=1, n_embd=8, batch_size=2)


def key(n_tokens: int = 200, vocab_size: int = 256, **changes: Any) -> str | None:
    return cohort_key(BYTES.model_copy(update=changes), vocab_size=vocab_size, n_tokens=n_tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.0}, {"seed": 7}, {"lr": 5e-3}, {"epochs": 3}, {"weight_decay": 0.0}, {"betas": (0.8, 0.9)},
        {"eps": 1e-6}, {"grad_clip": 1.0}, {"temperature": 1.0}, {"stop_at_perplexity": 2.0}, {"n_tokens": 300},
        {"lr_schedule": "cosine"}, {"tokenizer": "ptbr-8k"},
    ],
)  # fmt: skip
def test_jobs_of_one_shape_may_differ_in_everything_but_their_tensors(changes: dict[str, Any]) -> None:
    assert key(**changes) == key() is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 16}, {"n_layer": 2}, {"bias": False}, {"use_moe": True}, {"block_size": 16}, {"batch_size": 3},
        {"precision": "bfloat16"}, {"vocab_size": 512}, {"n_tokens": 20}, {"gradient_accumulation_steps": 2},
        {"deterministic": True},
    ],
)  # fmt: skip
def test_jobs_with_other_tensors_have_another_shape(changes: dict[str, Any]) -> None:
    assert key(**changes) != key()
    assert key(**changes) is not None


def test_a_job_that_fills_a_device_by_itself_has_no_shape() -> None:
    large = {"n_embd": 768, "n_layer": 12, "n_head": 12, "block_size": 1024, "batch_size": 12}
    assert key(n_tokens=1_000_000, vocab_size=50_257, **large) is None
    assert 12 * 1024 * 124e6 > MOST_WORK > 100 * 2e6


# Claims


def test_the_first_in_line_takes_those_of_its_shape_along(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    ids = [member(db) for _ in range(3)]
    other, alone = member(db, cohort_key="another"), submit(db, total_steps=100).id
    ids.append(member(db))
    (first,) = queue.claim_cohorts(db, worker, LEASE, 1, 64)
    assert [held.job_id for held in first] == ids
    assert [(held.fence, held.job.attempt, held.job.status, held.job.cohort_size) for held in first] == [
        (1, 1, "running", 4)
    ] * 4
    assert {held.job.lease_until for held in first} == {clock.now + timedelta(seconds=LEASE)}
    assert len({held.job.cohort_id for held in first}) == 1
    assert all(statuses(db, job_id) == ["queued", "running"] for job_id in ids)
    assert cohorts(db, worker, n=3) == [[other], [alone]]
    assert reads.get_job(db, other).cohort_id is None


def test_a_cohort_has_one_priority_and_a_width(db: Database, worker: WorkerIdentity) -> None:
    low = [member(db) for _ in range(5)]
    high = [member(db, priority=1) for _ in range(2)]
    assert cohorts(db, worker, n=3, width=3) == [high, low[:3], low[3:]]


def test_members_have_about_as_much_left_to_do(db: Database, worker: WorkerIdentity) -> None:
    first, long, short = member(db), member(db, total_steps=201), member(db, total_steps=49)
    alike = [member(db, total_steps=200), member(db, total_steps=50)]
    done = member(db, total_steps=300)
    with db.write() as session:
        session.execute(sa.update(table(Job)).where(table(Job).c.id == done).values(progress={"step": 150}))
    assert cohorts(db, worker) == [[first, *alike, done]]
    assert cohorts(db, worker, n=2) == [[long], [short]]


def test_a_job_that_began_with_several_threads_goes_on_by_itself(db: Database, worker: WorkerIdentity) -> None:
    wide, alone, one, fresh = (member(db) for _ in range(4))
    for job_id, n_threads in ((wide, 2), (alone, 2), (one, 1)):
        with db.write() as session:
            execution = {"device": "cpu", "n_threads": n_threads, "micro_batch": 2}
            session.execute(sa.update(table(Job)).where(table(Job).c.id == job_id).values(execution=execution))
    assert cohorts(db, worker, n=3) == [[wide], [alone], [one, fresh]]


def test_a_job_that_waits_is_not_taken_along(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    first = member(db)
    member(db, run_at=clock.now + timedelta(hours=1))
    cancelled, paused = member(db), member(db)
    queue.request_cancel(db, cancelled)
    queue.request_pause(db, paused)
    last = member(db)
    assert cohorts(db, worker) == [[first, last]]


def test_together_they_fit_half_of_the_memory(db: Database, worker: WorkerIdentity) -> None:
    ids = [member(db, training_bytes=1_000) for _ in range(5)]
    assert cohorts(db, replace(worker, memory_bytes=5_000), n=2) == [ids[:2], ids[2:4]]


def test_of_an_owner_no_more_are_claimed_than_may_run(db: Database, worker: WorkerIdentity) -> None:
    made = create_key(db, "ana", "member", quotas=Quotas(running_jobs=2))
    ana = db.acting_as(Caller("ana", sees_all=False, key_id=made.id))
    mine = [member(ana) for _ in range(4)]
    others = [member(db) for _ in range(2)]
    assert cohorts(db, worker, n=2) == [[*mine[:2], *others]]


def test_a_claim_of_one_forgets_the_cohort_before(db: Database, worker: WorkerIdentity) -> None:
    member(db), member(db)
    (held,) = queue.claim_cohorts(db, worker, LEASE, 1, 2)
    assert held[0].job.cohort_id is not None
    for one in held:
        assert queue.release(db, one).cohort_id == one.job.cohort_id
    alone = claim(db, worker).job
    assert (alone.cohort_id, alone.cohort_size) == (None, None)


def test_a_job_whose_trainer_crashed_is_claimed_alone_from_then_on(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    ids = [member(db) for _ in range(3)]
    (held,) = queue.claim_cohorts(db, worker, LEASE, 1, 64)
    queue.release(db, held[1], crash="signal 9")
    for one in (held[0], held[2]):
        queue.release(db, one, external_cause="the worker's disk")
    clock.advance(60)
    assert cohorts(db, worker, n=3) == [[ids[0], ids[2]], [ids[1]]]
    assert reads.get_job(db, ids[1]).crashes == 1


def test_jobs_of_a_worker_that_is_gone_are_claimed_together_again(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    ids = [member(db) for _ in range(3)]
    assert cohorts(db, worker) == [ids]
    worker_stopped(db, worker.id)
    clock.advance(LEASE + 1)
    assert [job.crashes for job in queue.rescue(db)] == [1, 1, 1]
    clock.advance(60)
    (again,) = queue.claim_cohorts(db, worker, LEASE, 1, 64)
    assert [held.job_id for held in again] == ids
    assert [held.fence for held in again] == [2, 2, 2]


def test_jobs_that_ran_out_of_memory_are_claimed_in_smaller_cohorts(db: Database, worker: WorkerIdentity) -> None:
    ids = [member(db) for _ in range(4)]
    (held,) = queue.claim_cohorts(db, worker, LEASE, 1, 64)
    for released in queue.release_jobs(db, [Release(one, cohort_most=2, interrupted="memory ran out") for one in held]):
        assert isinstance(released, Job)
        assert (released.status, released.crashes, released.status_reason) == ("queued", 0, "memory ran out")
    fresh = [member(db) for _ in range(2)]
    assert cohorts(db, worker, n=3) == [ids[:2], ids[2:], fresh]


def test_a_lost_lease_is_one_member_s_alone(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    ids = [member(db) for _ in range(3)]
    (held,) = queue.claim_cohorts(db, worker, LEASE, 1, 64)
    clock.advance(LEASE / 2)
    for one in held[:2]:
        recording.heartbeat(db, one)
    clock.advance(LEASE / 2 + 1)
    assert [job.id for job in queue.rescue(db)] == ids[2:]
    recording.record_checkpoint(db, held[0], percent=0, **CHECKPOINT)
    assert queue.finish(db, held[1], "succeeded").status == "succeeded"


OF_ONE_JOB: dict[str, Callable[[Database, Claim], Any]] = OWNERS_WRITES | {
    "a request to cancel": lambda db, held: queue.request_cancel(db, held.job_id),
    "a request to pause": lambda db, held: queue.request_pause(db, held.job_id),
    "a pause that is withdrawn": lambda db, held: (queue.request_pause(db, held.job_id), queue.resume(db, held.job_id)),
    "cancelled": lambda db, held: (queue.request_cancel(db, held.job_id), queue.release(db, held)),
    "cancelled as it crashed": lambda db, held: (
        queue.request_cancel(db, held.job_id), queue.release(db, held, crash="signal 9")
    ),
    "paused": lambda db, held: (queue.request_pause(db, held.job_id), queue.release(db, held)),
    "paused as memory ran out": lambda db, held: (
        queue.request_pause(db, held.job_id), release_from_company(db, held, 2)
    ),
    "cancelled as it succeeded": lambda db, held: (
        queue.request_cancel(db, held.job_id), queue.finish(db, held, "succeeded")
    ),
}  # fmt: skip
"""What may happen to a job that runs."""


def rows_of(db: Database, job_id: str, *, without: Set[str] = frozenset()) -> dict[str, list[Any]]:
    """Every row that is about a job, of every table; `without` these columns."""
    found = {}
    with db.read() as session:
        for name, rows in Job.metadata.tables.items():
            key = rows.c.id if name == "jobs" else rows.c.get("job_id")
            if key is not None:
                columns = [column for column in rows.columns if column.name not in without]
                found[name] = sorted(map(tuple, session.execute(sa.select(*columns).where(key == job_id))), key=str)
    return found


def test_what_happens_to_a_member_is_what_happens_to_a_job_alone_and_to_no_other(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    its_own = {"id", "job_id", "seq", "number", "cohort_id", "cohort_size"}
    for happens, do in OF_ONE_JOB.items():
        member(db)
        alone = prepared(db, claim(db, worker))
        _ = member(db), member(db)
        ((other, held),) = queue.claim_cohorts(db, worker, LEASE, 1, 2)
        before = rows_of(db, other.job_id)
        do(db, alone)
        do(db, prepared(db, held))
        assert rows_of(db, other.job_id) == before, happens
        assert rows_of(db, held.job_id, without=its_own) == rows_of(db, alone.job_id, without=its_own), happens
        with db.write() as session:
            session.execute(sa.delete(table(Job)))


def prepared(db: Database, held: Claim) -> Claim:
    recording.record_checkpoint(db, held, percent=0, **CHECKPOINT)
    recording.record_snapshot(db, held, step=1, folder="s", manifest_sha256="m")
    recording.record_steps(db, held, STEPS)
    return held


@pytest.mark.parametrize(
    ("ask", "becomes"),
    [(queue.request_cancel_sweep, "cancelled"), (queue.request_pause_sweep, "paused")],
    ids=["cancel", "pause"],
)
def test_a_whole_sweep_is_asked_for_while_some_of_it_is_trained_together(
    db: Database, worker: WorkerIdentity, ask: Callable[[Database, str], None], becomes: str
) -> None:
    jobs = [NewJob(text="a b", config={"seed": n}, cohort_key="shape", total_steps=100) for n in range(5)]
    sweep, _ = submit_sweep(db, NewSweep(jobs=jobs, config={}, parameters=[]))
    (cohort,) = queue.claim_cohorts(db, worker, LEASE, 1, 3)
    ended = queue.finish(db, cohort[0], "succeeded")
    ask(db, sweep.id)
    found = [reads.get_job(db, job_id).status for job_id in sweeps.get_sweep(db, sweep.id)[2].job_ids]
    assert found == ["succeeded", "running", "running", becomes, becomes]
    # Each member's worker is told with its next write, and each ends by itself.
    for held in cohort[1:]:
        told = recording.heartbeat(db, held)
        assert (told.cancel, told.pause) == (becomes == "cancelled", becomes == "paused")
        assert queue.release(db, held).status == becomes
    assert reads.get_job(db, ended.id) == ended
    if becomes == "paused":
        queue.resume_sweep(db, sweep.id)
        assert cohorts(db, worker) == [
            [held.job_id for held in cohort[1:]] + sweeps.get_sweep(db, sweep.id)[2].job_ids[3:]
        ]


def test_a_cancel_of_a_sweep_and_a_claim_of_its_jobs_at_once_lose_none(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    jobs = [NewJob(text="a b", config={"seed": n}, cohort_key="shape", total_steps=100) for n in range(4)]
    sweep, _ = submit_sweep(db, NewSweep(jobs=jobs, config={}, parameters=[]))
    claiming = races.hold(queue.claim_cohorts, db, worker, LEASE, 1, 3)
    cancelling = races.start(queue.request_cancel_sweep, db, sweep.id)
    (cohort,) = claiming.let_go()
    cancelling.result(30)
    found = [reads.get_job(db, job_id) for job_id in sweeps.get_sweep(db, sweep.id)[2].job_ids]
    assert [job.status for job in found] == ["running"] * 3 + ["cancelled"]
    assert all(job.cancel_requested_at for job in found)
    assert [queue.release(db, held).status for held in cohort] == ["cancelled"] * 3


def test_the_rescuers_of_a_cohort_and_its_worker_at_once_end_each_attempt_once(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    ids = [member(db) for _ in range(8)]
    (cohort,) = queue.claim_cohorts(db, worker, LEASE, 1, 8)
    clock.advance(LEASE + 1)

    def release() -> list[str]:
        return [one.job_id for one in cohort if not isinstance(released(one), LeaseLost)]

    def released(one: Claim) -> Job | LeaseLost:
        try:
            return release_from_company(db, one, 4)
        except LeaseLost as error:
            return error

    moved = at_once([lambda: [job.id for job in queue.rescue(db)]] * 4 + [release] * 2)
    assert sorted(job_id for one in moved for job_id in one) == sorted(ids)
    assert all(statuses(db, job_id) == ["queued", "running", "queued"] for job_id in ids)


def test_workers_at_once_claim_every_job_once(db: Database, worker: WorkerIdentity) -> None:
    ids = [member(db) for _ in range(40)]

    def claim_all() -> list[str]:
        mine: list[str] = []
        while found := cohorts(db, worker, n=2, width=3):
            mine += [job_id for one in found for job_id in one]
        return mine

    claimed = [job_id for mine in at_once([claim_all] * 6) for job_id in mine]
    assert sorted(claimed) == sorted(ids)


@ONLY_POSTGRESQL
def test_a_cohort_passes_over_rows_that_another_claim_holds(db: Database, worker: WorkerIdentity, races: Races) -> None:
    ids = [member(db) for _ in range(6)]
    first = races.hold(queue.claim_cohorts, db, worker, LEASE, 1, 3)
    assert cohorts(db, worker) == [ids[3:]]
    assert [held.job_id for held in first.let_go()[0]] == ids[:3]


@ONLY_POSTGRESQL  # SQLite has one writer
def test_workers_that_claim_cohorts_of_the_same_owners_do_not_block_each_other_in_a_circle(
    db: Database, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        create_key(db, name, "member")
    # Each claims two jobs, of one owner and then of the other; who comes first takes a job of b.
    ids = [member(db.acting_as(Caller(name)), cohort_key=str(n)) for n, name in enumerate("baab")]
    in_the_middle, mine = threading.Barrier(2), threading.local()

    def lock_cohort(*arguments: Any) -> Any:
        mine.calls = getattr(mine, "calls", 0) + 1
        if mine.calls == 2:
            in_the_middle.wait(TIMEOUT_SECONDS)
        return cohorts_module.lock_cohort(*arguments)

    monkeypatch.setattr(queue, "lock_cohort", lock_cohort)
    claimed = at_once([lambda: cohorts(db, worker, n=2, width=2)] * 2)
    assert sorted(job_id for those in claimed for one in those for job_id in one) == sorted(ids)


def test_a_worker_of_another_schema_claims_no_cohort(db: Database, worker: WorkerIdentity) -> None:
    job = member(db)
    with db.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaMismatch):
        queue.claim_cohorts(db, worker, LEASE, 1, 2)
    assert reads.get_job(db, job).status == "queued"


def test_a_claim_of_a_cohort_reads_the_indexes_of_queued_jobs_and_no_more(db: Database, worker: WorkerIdentity) -> None:
    job = submit(db, cohort_key="shape", total_steps=100)
    copy_job(db, job, 3_000, status="queued")
    copy_job(db, job, 3_000, status="queued", cohort_key="another")
    copy_job(db, job, 3_000, status="succeeded", finished_at=job.created_at)
    if not db.is_sqlite:
        with db.write() as session:
            session.execute(sa.text("ANALYZE jobs"))
    plan = "\n".join(plans_of(db, lambda: queue.claim_cohorts(db, worker, LEASE, 1, 8)))
    assert "ix_jobs_claim" in plan
    if db.is_sqlite:  # PostgreSQL may find it cheaper to read the line itself, until it has so many of one shape
        assert "ix_jobs_cohort" in plan
    assert "TEMP B-TREE" not in plan
    assert "Seq Scan on jobs" not in plan


def test_members_that_are_rescued_together_are_claimed_together_again(db: Database, worker: WorkerIdentity) -> None:
    for _ in range(3):
        member(db)
    (held,) = cohorts(db, worker)
    jobs = table(Job)
    with db.write() as session:
        session.execute(sa.update(jobs).values(lease_until=sa.literal(1), worker_id="gone"))
    rescued = queue.rescue(db)  # by the database's own clock, which goes on between two statements
    assert [job.id for job in rescued] == sorted(held)
    assert len({job.waits_since for job in rescued}) == 1
    assert all(job.crashes == 1 and job.cohort_key == "shape" for job in rescued)
