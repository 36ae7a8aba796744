"""Places in the line, on SQLite and on PostgreSQL."""

from datetime import datetime, timedelta
from typing import Any

from service.database.database import Database
from service.jobs import queue, recording
from service.jobs.lease import Claim
from service.jobs.queue_position import MAX_POSITION, QueuePosition, find_queue_position
from service.jobs.workers import WorkerIdentity, worker_seen, worker_started
from tests.databases import Clock
from tests.queued import claim, copy_job, running, submit


def position(db: Database, job_id: str) -> int | None:
    place = find_queue_position(db, job_id)
    return place and place.position


def estimate(db: Database, job_id: str) -> datetime | None:
    place = find_queue_position(db, job_id)
    return place and place.estimated_start_at


def test_the_position_counts_who_goes_first(db: Database, worker: WorkerIdentity) -> None:
    first, second, urgent = submit(db), submit(db), submit(db, priority=1)
    assert [position(db, job.id) for job in (urgent, first, second)] == [0, 1, 2]
    claim(db, worker)
    assert [position(db, job.id) for job in (urgent, first, second)] == [None, 0, 1]
    assert position(db, "0" * 32) is None


def test_the_position_is_counted_up_to_a_thousand(db: Database) -> None:
    first = submit(db)
    copy_job(db, first, 1_200, idempotency_key=None)
    last = submit(db)
    assert position(db, first.id) == 0
    assert position(db, last.id) == MAX_POSITION == 1_000


def test_the_jobs_of_a_cohort_have_one_slot(db: Database, clock: Clock) -> None:
    worker = WorkerIdentity(slots=2)
    worker_started(db, worker)
    for _ in range(3):
        submit(db, cohort_key="shape", total_steps=100)
    (cohort,) = queue.claim_cohorts(db, worker, 600, 1, 3)
    waits, second = submit(db).id, submit(db).id
    for held, eta in zip(cohort, (20.0, 90.0, 30.0), strict=True):
        recording.heartbeat(db, held, {"eta_seconds": eta})
    assert estimate(db, waits) == clock.now
    recording.heartbeat(db, claim(db, worker), {"eta_seconds": 500.0})
    assert estimate(db, second) == clock.now + timedelta(seconds=90)


TOGETHER: dict[str, Any] = {"cohort": 3, "devices": [{"device": "cpu", "name": "cpu", "memory_bytes": 1_000}]}


def test_jobs_that_will_be_claimed_together_have_one_place(db: Database, clock: Clock) -> None:
    worker_started(db, WorkerIdentity(**TOGETHER))
    member = {"cohort_key": "shape", "total_steps": 100}
    first, other, taken, third, fourth, late = (
        submit(db, **changes).id for changes in (member, {}, member, member, member, {"total_steps": 100})
    )
    urgent = submit(db, priority=1, **member).id
    assert [position(db, one) for one in (urgent, first, taken, third)] == [0, 1, 1, 1]
    assert [position(db, one) for one in (other, fourth, late)] == [4, 5, 6]
    large = submit(db, training_bytes=1_001).id
    assert position(db, large) == 7
    assert position(db, submit(db).id) == 8  # the large one stands before it, though no worker can take it yet


def test_jobs_ahead_that_will_be_trained_together_have_one_slot(db: Database, clock: Clock) -> None:
    worker = WorkerIdentity(**TOGETHER)
    worker_started(db, worker)
    member = MODEL | {"cohort_key": "shape", "total_steps": 200}
    for _ in range(3):
        submit(db, **member)
    (cohort,) = queue.claim_cohorts(db, worker, 600, 1, 3)
    for held in cohort:
        train(db, held, step=100, seconds_left=50)  # half a second a step of three
    alike = [submit(db, **member).id for _ in range(3)]
    pair = [submit(db, **member | {"total_steps": 150}).id for _ in range(2)]
    last = submit(db).id
    assert [estimate(db, one) for one in alike] == [clock.now + timedelta(seconds=50)] * 3
    assert [estimate(db, one) for one in pair] == [clock.now + timedelta(seconds=50 + 200 * 0.5)] * 2
    assert estimate(db, last) == clock.now + timedelta(seconds=150 + 150 * 0.5 * 2 / 3)


def test_the_start_is_estimated_for_as_many_as_there_are_slots(db: Database, clock: Clock) -> None:
    worker = WorkerIdentity(slots=2)
    first, second, third, fourth, fifth = (submit(db).id for _ in range(5))
    assert estimate(db, first) is None  # no worker is there
    worker_started(db, worker)
    assert estimate(db, first) == clock.now
    assert estimate(db, third) is None  # nobody knows how long the first two take

    claims = [queue.claim(db, worker, 600) for _ in range(2)]
    assert estimate(db, third) is None  # nor does one that runs say so yet
    for held, eta in zip(claims, (90.0, 30.0), strict=True):
        assert held is not None
        recording.heartbeat(db, held, {"eta_seconds": eta})
    assert estimate(db, third) == clock.now + timedelta(seconds=30)
    assert estimate(db, fourth) == clock.now + timedelta(seconds=90)
    assert estimate(db, fifth) is None
    assert estimate(db, second) is None  # it runs

    clock.advance(61)
    assert estimate(db, third) is None  # the worker has not been seen


def test_a_worker_with_long_leases_beats_rarely_and_counts_meanwhile(db: Database, clock: Clock) -> None:
    worker_started(db, WorkerIdentity(lease_seconds=600))
    job = submit(db)
    clock.advance(599)
    assert estimate(db, job.id) == clock.now
    clock.advance(2)
    assert estimate(db, job.id) is None


# A job that waits for a date or for the end of a back-off


def test_a_clock_that_was_ahead_delays_no_estimate(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    clock.advance(7200)
    job = submit(db)
    clock.advance(-7200)
    worker_seen(db, worker.id)
    assert find_queue_position(db, job.id) == QueuePosition(0, clock.now)


def test_a_job_that_waits_stands_ahead_of_none_that_can_start_now(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    crashed = queue.release(db, running(db, worker), crash="signal 11")
    dated = submit(db, run_at=clock.now + timedelta(seconds=60), priority=9)
    ready = submit(db)
    assert find_queue_position(db, ready.id) == QueuePosition(0, clock.now)
    # When it has waited 15 s, whoever is ready goes in its order: the crashed one came first.
    assert position(db, crashed.id) == 0
    assert position(db, dated.id) == 0
    queue.request_cancel(db, ready.id)
    assert estimate(db, crashed.id) == clock.now + timedelta(seconds=15)
    queue.request_cancel(db, crashed.id)
    assert estimate(db, dated.id) == clock.now + timedelta(seconds=60)
    clock.advance(60)
    worker_seen(db, worker.id)
    late = submit(db, priority=1)
    assert [position(db, job.id) for job in (dated, late)] == [0, 1]


def test_many_jobs_that_wait_for_their_date_stand_ahead_of_nobody(db: Database, clock: Clock) -> None:
    dated = submit(db, run_at=clock.now + timedelta(days=1), priority=1)
    copy_job(db, dated, MAX_POSITION + 100, idempotency_key=None)
    assert position(db, submit(db).id) == 0


# How long those take that go first


MODEL = {"n_tokens": 1000, "n_active_params": 1_000_000, "config": {
    "batch_size": 12, "gradient_accumulation_steps": 1, "block_size": 100}}  # fmt: skip


def train(db: Database, held: Claim, *, step: int, seconds_left: float) -> None:
    recording.heartbeat(db, held, {"step": step, "eta_seconds": seconds_left})


def test_those_that_go_first_are_taken_to_train_as_fast_as_one_like_them_that_runs(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    train(db, running(db, worker, total_steps=200, **MODEL), step=100, seconds_left=50)  # half a second a step
    same = submit(db, total_steps=400, **MODEL)
    twice = submit(db, total_steps=100, **MODEL | {"n_active_params": 2_000_000})
    last = submit(db, total_steps=10, **MODEL)
    places = [find_queue_position(db, job.id) for job in (same, twice, last)]
    starts = [50, 50 + 400 * 0.5, 50 + 400 * 0.5 + 100 * 0.5 * 2]
    assert places == [QueuePosition(n, clock.now + timedelta(seconds=start)) for n, start in enumerate(starts)]


def test_two_slots_share_the_line(db: Database, clock: Clock) -> None:
    worker = WorkerIdentity(slots=2)
    worker_started(db, worker)
    for seconds in (50, 80):
        train(db, running(db, worker, total_steps=200, **MODEL), step=100, seconds_left=seconds)
    jobs = [submit(db, total_steps=200, **MODEL) for _ in range(3)]
    # The one that starts after 50 s needs 100 s, as the first that runs does.
    assert [estimate(db, job.id) for job in jobs] == [clock.now + timedelta(seconds=s) for s in (50, 80, 150)]


def test_of_a_job_unlike_all_that_run_nobody_can_say_how_long_it_takes(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    train(db, running(db, worker, total_steps=200, **MODEL), step=100, seconds_left=50)
    unlike = submit(db, total_steps=100, **MODEL | {"n_active_params": 1_000})
    last = submit(db, total_steps=100, **MODEL)
    assert estimate(db, unlike.id) == clock.now + timedelta(seconds=50)
    assert find_queue_position(db, last.id) == QueuePosition(1, None)


def test_a_job_that_was_interrupted_is_taken_to_need_what_it_said_last(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    recording.heartbeat(db, held, {"step": 10, "eta_seconds": 30})
    queue.release(db, held)
    assert estimate(db, submit(db).id) == clock.now + timedelta(seconds=30)


def test_a_job_that_no_worker_has_the_memory_for_starts_never_and_holds_up_nobody(db: Database, clock: Clock) -> None:
    worker_started(db, WorkerIdentity(devices=[{"device": "cpu", "name": "cpu", "memory_bytes": 1000}]))
    large, small = submit(db, training_bytes=2000), submit(db, training_bytes=500)
    assert estimate(db, large.id) is None
    assert estimate(db, small.id) == clock.now
