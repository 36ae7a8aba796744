"""Sweeps on both databases: submitted whole or not at all, asked for and deleted whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from service.database.database import Database
from service.errors import Conflict, Invalid, NotFound, TooManyRequests
from service.jobs import queue, reads, recording, sweeps
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.numbered_events import EventFilter, EventReader, NumberedEvent
from service.jobs.statuses import STATUSES, Status
from service.jobs.submit import submit_sweep
from service.jobs.tables import Job, Sweep
from service.jobs.workers import WorkerIdentity, worker_started
from tests.databases import Clock
from tests.queued import CHECKPOINT, LEASE, claim, everything, submit
from tests.races import Races, at_once


def new_sweep(n: int = 3, *, text: str = "Era uma vez", **changes: Any) -> NewSweep:
    jobs = [NewJob(text=text, config={"seed": seed}, name=f"seed={seed}", total_steps=4) for seed in range(n)]
    parameters = [{"name": "seed", "values": list(range(n))}]
    return NewSweep(**{"jobs": jobs, "config": {}, "parameters": parameters, **changes})


def submitted(db: Database, n: int = 3, **changes: Any) -> Sweep:
    sweep, created = submit_sweep(db, new_sweep(n, **changes))
    assert created
    return sweep


def jobs_of(db: Database, sweep: Sweep) -> list[Job]:
    return [reads.get_job(db, job_id) for job_id in sweeps.get_sweep(db, sweep.id)[2].job_ids]


def statuses_of(db: Database, sweep: Sweep) -> list[Status]:
    return [job.status for job in jobs_of(db, sweep)]


def events_of(db: Database, sweep: Sweep) -> list[NumberedEvent]:
    return EventReader(db, EventFilter(sweep_id=sweep.id), 0).read()[0]


# Submitting


def test_the_jobs_of_a_sweep_are_jobs_like_others(db: Database, worker: WorkerIdentity) -> None:
    before = submit(db)
    sweep = submitted(db, name="seeds")
    after = submit(db)
    jobs = jobs_of(db, sweep)
    assert [job.name for job in jobs] == ["seed=0", "seed=1", "seed=2"]
    assert [job.tags for job in jobs] == [{"sweep": sweep.id}] * 3
    assert [job.seq for job in (before, *jobs, after)] == [1, 2, 3, 4, 5]
    assert [job.id for job in reads.list_jobs(db, reads.JobFilter(tag=("sweep", sweep.id)))] == [
        job.id for job in reversed(jobs)
    ]
    assert claim(db, worker).job_id == before.id
    assert claim(db, worker).job_id == jobs[0].id
    queue.request_cancel(db, jobs[1].id)
    assert statuses_of(db, sweep) == ["running", "cancelled", "queued"]


def test_a_text_is_stored_once(db: Database) -> None:
    submit(db, text="a")
    jobs = [NewJob(text=text, config={"seed": seed}) for seed in range(2) for text in ("b", "a")]
    submit_sweep(db, new_sweep(jobs=jobs))
    assert len(everything(db)["texts"]) == 2


def test_the_queue_counts_a_sweep_whole(db: Database) -> None:
    submit(db)
    untouched = everything(db)
    with pytest.raises(TooManyRequests, match="1 jobs are waiting already, and 3 are new; at most 3 may wait"):
        submit_sweep(db, new_sweep(3), max_queued=3)
    assert everything(db) == untouched
    submit_sweep(db, new_sweep(2), max_queued=3)


def test_a_sweep_that_fails_leaves_nothing(db: Database) -> None:
    untouched = everything(db)
    child = NewJob(text="b", config={}, parent_id="0" * 32, parent_percent=100)
    with pytest.raises(NotFound):
        submit_sweep(db, new_sweep(jobs=[NewJob(text="a", config={}), child]))
    assert everything(db) == untouched


# Idempotency keys


def test_the_same_key_and_request_give_the_same_sweep(db: Database) -> None:
    first, created = submit_sweep(db, new_sweep(idempotency_key="k"))
    again, created_again = submit_sweep(db, new_sweep(idempotency_key="k"))
    assert (created, created_again) == (True, False)
    assert first.id == again.id
    assert len(reads.list_jobs(db)) == 3


@pytest.mark.parametrize(
    "changes",
    [{"name": "other"}, {"tags": {"a": "b"}}, {"text": "other"}, {"n": 2}],
    ids=lambda given: next(iter(given)),
)
def test_the_same_key_with_another_request_is_refused(db: Database, changes: dict[str, Any]) -> None:
    submit_sweep(db, new_sweep(idempotency_key="k"))
    with pytest.raises(Invalid) as refused:
        submit_sweep(db, new_sweep(idempotency_key="k", **changes))
    assert refused.value.code == "idempotency_key_reused"
    assert len(reads.list_jobs(db)) == 3


def test_many_submits_with_one_key_make_one_sweep(db: Database) -> None:
    def once() -> str:
        return submit_sweep(db, new_sweep(idempotency_key="k"))[0].id

    assert len(set(at_once([once] * 8))) == 1
    assert len(reads.list_jobs(db)) == 3


def test_a_submit_that_meets_another_with_its_key_gets_that_ones_sweep(db: Database, races: Races) -> None:
    first = races.hold(submit_sweep, db, new_sweep(idempotency_key="k"))
    second = races.start(submit_sweep, db, new_sweep(idempotency_key="k"))
    made, created = first.let_go()
    found, created_again = second.result()
    assert (created, created_again) == (True, False)
    assert made.id == found.id


# Cancelling, pausing, resuming and deleting a whole sweep


def in_every_status(db: Database, worker: WorkerIdentity) -> Sweep:
    """A sweep of six jobs, one in each status."""
    sweep = submitted(db, 6)
    succeeded, failed, _ = (claim(db, worker) for _ in range(3))
    queue.finish(db, succeeded, "succeeded")
    queue.finish(db, failed, "failed", error={"code": "c", "message": "m"})
    waiting = jobs_of(db, sweep)[3:]
    queue.request_pause(db, waiting[0].id)
    queue.request_cancel(db, waiting[1].id)
    assert statuses_of(db, sweep) == ["succeeded", "failed", "running", "paused", "cancelled", "queued"]
    return sweep


ASKED: dict[str, tuple[Callable[[Database, str], None], list[str], dict[str, bool]]] = {
    "cancel": (
        queue.request_cancel_sweep,
        ["succeeded", "failed", "running", "cancelled", "cancelled", "cancelled"],
        {"cancel_requested_at": True},
    ),
    "pause": (
        queue.request_pause_sweep,
        ["succeeded", "failed", "running", "paused", "cancelled", "paused"],
        {"pause_requested_at": True},
    ),
    "resume": (
        queue.resume_sweep,
        ["succeeded", "failed", "running", "queued", "cancelled", "queued"],
        {"pause_requested_at": False},
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_request_reaches_every_job_that_it_applies_to(db: Database, worker: WorkerIdentity, asked: str) -> None:
    request, expected, marks = ASKED[asked]
    sweep = in_every_status(db, worker)
    if asked == "resume":
        queue.request_pause_sweep(db, sweep.id)
        queue.resume(db, jobs_of(db, sweep)[5].id)
    for _ in range(2):  # harmless when repeated
        request(db, sweep.id)
        assert statuses_of(db, sweep) == expected
    running = jobs_of(db, sweep)[2]
    assert {name: getattr(running, name) is not None for name in marks} == marks
    logged = [event.data["status"] for event in reads.events_after(db, jobs_of(db, sweep)[5].id, 0)]
    assert logged[-1] == expected[5]
    assert logged == [status for status, before in zip(logged, [None, *logged], strict=False) if status != before]


REFUSED = {
    "cancel": ("not_cancellable", ("succeeded", "failed")),
    "pause": ("not_pausable", ("succeeded", "failed", "cancelled")),
    "resume": ("not_resumable", ("succeeded", "failed", "cancelled")),
}


@pytest.mark.parametrize("status", STATUSES)
def test_a_sweep_all_of_whose_jobs_have_one_status_is_asked_for(
    db: Database, worker: WorkerIdentity, status: Status
) -> None:
    for asked, (code, refused_in) in REFUSED.items():
        sweep = submitted(db, 2)
        bring_to(db, worker, sweep, status)
        request = ASKED[asked][0]
        if status in refused_in:
            with pytest.raises(Conflict) as conflict:
                request(db, sweep.id)
            assert conflict.value.code == code
            assert statuses_of(db, sweep) == [status] * 2
        else:
            request(db, sweep.id)
            assert len(set(statuses_of(db, sweep))) == 1
            queue.request_cancel_sweep(db, sweep.id)  # the next is to be claimed


def bring_to(db: Database, worker: WorkerIdentity, sweep: Sweep, status: Status) -> None:
    """Give every job of a new sweep this status."""
    for _ in range(2):
        match status:
            case "running":
                claim(db, worker)
            case "succeeded":
                queue.finish(db, claim(db, worker), "succeeded")
            case "failed":
                queue.finish(db, claim(db, worker), "failed", error={"code": "c", "message": "m"})
    if status == "paused":
        queue.request_pause_sweep(db, sweep.id)
    if status == "cancelled":
        queue.request_cancel_sweep(db, sweep.id)
    assert statuses_of(db, sweep) == [status] * 2


def test_an_unknown_sweep_is_not_found(db: Database) -> None:
    for request in (*(found[0] for found in ASKED.values()), queue.delete_sweep):
        with pytest.raises(NotFound) as missing:
            request(db, "0" * 32)
        assert missing.value.code == "sweep_not_found"


def test_deleting_a_sweep_leaves_nothing_that_others_do_not_need(db: Database, worker: WorkerIdentity) -> None:
    kept = submit(db, text="kept")
    queue.request_cancel(db, kept.id)
    untouched = everything(db)
    jobs = [NewJob(text=text, config={}) for text in ("gone", "kept")]
    sweep = submitted(db, jobs=jobs)
    held = claim(db, worker)
    recording.record_steps(db, held, {"step": [1], "train_loss": [1.0], "lr": [1.0], "grad_norm": [1.0]})
    recording.record_checkpoint(db, held, percent=0, **CHECKPOINT)
    queue.finish(db, held, "succeeded")
    queue.request_cancel_sweep(db, sweep.id)
    ids = [job.id for job in jobs_of(db, sweep)]
    assert queue.delete_sweep(db, sweep.id) == ids
    assert everything(db) == untouched | {"counters": everything(db)["counters"]}


def test_a_sweep_that_has_not_ended_is_not_deleted(db: Database, worker: WorkerIdentity) -> None:
    sweep = in_every_status(db, worker)
    untouched = everything(db)
    with pytest.raises(Conflict, match="3 of the 6 jobs") as refused:
        queue.delete_sweep(db, sweep.id)
    assert refused.value.code == "sweep_not_finished"
    assert everything(db) == untouched


def test_a_sweep_from_which_another_job_started_is_not_deleted(db: Database) -> None:
    sweep = submitted(db)
    queue.request_cancel_sweep(db, sweep.id)
    child = submit(db, parent_id=jobs_of(db, sweep)[1].id, parent_percent=100)
    with pytest.raises(Conflict) as refused:
        queue.delete_sweep(db, sweep.id)
    assert refused.value.code == "has_dependents"
    queue.request_cancel(db, child.id)
    queue.delete(db, child.id)
    queue.delete_sweep(db, sweep.id)


def test_a_sweep_goes_with_its_last_job(db: Database) -> None:
    sweep = submitted(db, 2)
    queue.request_cancel_sweep(db, sweep.id)
    first, last = jobs_of(db, sweep)
    queue.delete(db, first.id)
    assert len(jobs_of(db, sweep)) == 1
    queue.delete(db, last.id)
    with pytest.raises(NotFound):
        sweeps.get_sweep(db, sweep.id)


def test_of_two_deletes_of_the_last_jobs_one_takes_the_sweep(db: Database, races: Races) -> None:
    sweep = submitted(db, 2)
    queue.request_cancel_sweep(db, sweep.id)
    first, last = jobs_of(db, sweep)
    deleting = races.hold(queue.delete, db, first.id)
    also = races.start(queue.delete, db, last.id)
    deleting.let_go()
    also.result()
    assert everything(db)["sweeps"] == []


# Requests that meet a worker


def test_a_claim_that_meets_a_cancel_finds_nothing(db: Database, worker: WorkerIdentity, races: Races) -> None:
    sweep = submitted(db)
    cancelling = races.hold(queue.request_cancel_sweep, db, sweep.id)
    if not db.is_sqlite:  # locked rows are skipped
        assert queue.claim(db, worker, LEASE) is None
    cancelling.let_go()
    assert queue.claim(db, worker, LEASE) is None
    assert statuses_of(db, sweep) == ["cancelled"] * 3


def test_a_cancel_that_meets_a_claim_asks_its_worker(db: Database, worker: WorkerIdentity, races: Races) -> None:
    sweep = submitted(db)
    claiming = races.hold(queue.claim, db, worker, LEASE)
    cancelling = races.start(queue.request_cancel_sweep, db, sweep.id)
    claiming.let_go()
    cancelling.result()
    assert statuses_of(db, sweep) == ["running", "cancelled", "cancelled"]
    assert jobs_of(db, sweep)[0].cancel_requested_at is not None
    assert [event.data["status"] for event in events_of(db, sweep)] == ["queued"] * 3 + ["running"] + ["cancelled"] * 2


def test_a_rescue_that_meets_a_finish_waits_for_no_lock_in_a_circle(
    db: Database, worker: WorkerIdentity, races: Races, clock: Clock
) -> None:
    """The finish holds its job, which the rescue passes over."""
    sweep = submitted(db)
    held = claim(db, worker)
    for _ in range(2):
        claim(db, worker)
    clock.advance(LEASE + 1)
    finishing = races.hold(queue.finish, db, held, "succeeded")
    rescuing = races.start(queue.rescue, db)
    finishing.let_go()
    assert len(rescuing.result()) == 2
    assert statuses_of(db, sweep) == ["succeeded", "queued", "queued"]


# Status and progress


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"queued": 3}, "queued"),
        ({"queued": 2, "running": 1}, "running"),
        ({"queued": 2, "succeeded": 1}, "running"),
        ({"queued": 1, "paused": 2}, "queued"),
        ({"paused": 1, "succeeded": 2}, "paused"),
        ({"failed": 1, "cancelled": 1, "succeeded": 9}, "failed"),
        ({"cancelled": 1, "succeeded": 9}, "cancelled"),
        ({"succeeded": 9}, "succeeded"),
    ],
)
def test_the_status_follows_from_those_of_the_jobs(counts: dict[Status, int], expected: Status) -> None:
    assert sweeps.status_of(dict.fromkeys(STATUSES, 0) | counts) == expected


def test_progress_is_that_of_all_jobs(db: Database, worker: WorkerIdentity, clock: Clock) -> None:
    jobs = [NewJob(text="a b", config={}, total_steps=4, n_active_params=10) for _ in range(4)]
    sweep = submitted(db, jobs=jobs)
    assert sweeps.get_sweep(db, sweep.id)[2].eta_seconds is None
    first = claim(db, worker)
    clock.advance(8)
    queue.finish(db, first, "succeeded", progress={"step": 4, "percent": 100.0})
    second = claim(db, worker)
    recording.heartbeat(db, second, {"step": 1, "percent": 25.0, "eta_seconds": 6.0})
    _, counts, progress = sweeps.get_sweep(db, sweep.id)
    assert (counts["succeeded"], counts["running"], counts["queued"]) == (1, 1, 2)
    assert (progress.step, progress.total_steps, progress.percent) == (5, 16, 31.25)
    assert progress.eta_seconds == 6 + 2 * 8  # one at a time, two seconds a step
    queue.request_pause(db, progress.job_ids[3])
    assert sweeps.get_sweep(db, sweep.id)[2].eta_seconds is None


def test_sweeps_are_listed_newest_first(db: Database) -> None:
    made = [submitted(db, n).id for n in (1, 2, 3)]
    found = sweeps.list_sweeps(db, limit=2)
    assert [(sweep.id, counts["queued"]) for sweep, counts in found] == [(made[2], 3), (made[1], 2)]
    assert [sweep.id for sweep, _ in sweeps.list_sweeps(db, before=found[-1][0].seq)] == [made[0]]


def test_the_jobs_of_a_cohort_share_its_time(db: Database, clock: Clock) -> None:
    worker = WorkerIdentity(devices=[{"device": "cpu", "memory_bytes": 100}], cohort=4)
    worker_started(db, worker)
    jobs = [replace(job, cohort_key="shape", n_active_params=10) for job in new_sweep(10).jobs]
    sweep = submitted(db, jobs=jobs)

    def eta() -> float | None:
        return sweeps.get_sweep(db, sweep.id)[2].eta_seconds

    (first,) = queue.claim_cohorts(db, worker, 600, 1, 4)
    for held in first:
        recording.heartbeat(db, held, {"step": 2, "eta_seconds": 5.0})
    assert eta() == 5 + 6 * 10 / 4
    clock.advance(10)
    queue.finish_jobs(db, [queue.Finish(held, "succeeded", progress={"step": 4}) for held in first[:3]])
    recording.heartbeat(db, first[3], {"step": 3, "eta_seconds": 2.5})
    # The last one does its steps by itself now: of how the others will run it is one example, and those before three.
    assert eta() == pytest.approx(2.5 + 6 * (3 * 10 / 4 + 10) / 4)
