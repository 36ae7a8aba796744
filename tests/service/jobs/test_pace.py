"""How jobs that are not submitted yet would be trained: which together, and in how much time."""

import pytest

from service.access.keys import create_key
from service.access.quotas import Quotas
from service.database.caller import Caller
from service.database.database import Database
from service.jobs import queue
from service.jobs.forecast import Slot
from service.jobs.pace import RECENT_JOBS, Pace, Planned, Prediction, measure_pace, predict
from service.jobs.workers import WorkerIdentity, worker_seen, worker_started, worker_stopped
from tests.databases import Clock
from tests.queued import submit


def planned(
    key: str | None = "shape", steps: int | None = 4, params: int | None = 10, training_bytes: int | None = None
) -> Planned:
    return Planned(key, training_bytes, steps, params)


def pace(*slots: Slot, **rates: float) -> Pace:
    """`alone`, and `of_N` for cohorts of N jobs."""
    return Pace({1 if name == "alone" else int(name[3:]): rate for name, rate in rates.items()}, slots)


def train(db: Database, clock: Clock, worker: WorkerIdentity, n: int, seconds: float) -> None:
    """Jobs of 40 units of work, together."""
    for _ in range(n):
        submit(db, total_steps=4, n_active_params=10, cohort_key="shape")
    (claimed,) = queue.claim_cohorts(db, worker, 600, 1, n)
    assert len(claimed) == n
    clock.advance(seconds)
    queue.finish_jobs(db, [queue.Finish(held, "succeeded", progress={"step": 4}) for held in claimed])


def test_the_pace_is_that_of_the_jobs_that_succeeded_last_each_with_its_share(db: Database, clock: Clock) -> None:
    nobody = measure_pace(db)
    assert (nobody.seconds_per_work, nobody.slots) == ({}, [])
    worker = WorkerIdentity(slots=2, cohort=8, devices=[{"device": "cpu", "name": "cpu", "memory_bytes": 1_000}])
    worker_started(db, worker)
    for _ in range(RECENT_JOBS):
        train(db, clock, worker, 1, 400)
    for seconds in [8] * RECENT_JOBS:
        train(db, clock, worker, 1, seconds)
    for seconds in (16, 20, 24):
        train(db, clock, worker, 4, seconds)
    worker_seen(db, worker.id)
    found = measure_pace(db)
    assert found.seconds_per_work == {1: 8 / 40, 4: pytest.approx(20 / 4 / 40)}
    assert found.slots == [Slot(memory_bytes=1_000, cohort_bytes=500, width=8)] * 2
    worker_stopped(db, worker.id)
    assert measure_pace(db).slots == []


def test_what_a_job_took_that_was_interrupted_says_nothing(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    submit(db, total_steps=4, n_active_params=10)
    for _ in range(2):
        held = queue.claim(db, worker, 600)
        assert held is not None
        clock.advance(100)
        if held.fence == 1:
            queue.release(db, held)
    queue.finish(db, held, "succeeded", progress={"step": 4})
    assert measure_pace(db).seconds_per_work == {}


def test_an_owner_who_may_run_few_has_small_cohorts(db: Database) -> None:
    worker_started(db, WorkerIdentity(cohort=8, devices=[{"device": "cpu", "name": "cpu", "memory_bytes": 1_000}]))
    made = create_key(db, "ana", "member", quotas=Quotas(running_jobs=3))
    ana = db.acting_as(Caller("ana", sees_all=False, key_id=made.id))
    assert [(one[0].width) for one in (measure_pace(db).slots, measure_pace(ana).slots)] == [8, 3]


def test_without_a_worker_nothing_is_known() -> None:
    assert predict([planned()] * 2, pace(alone=0.5)) == Prediction([None, None], None, None)


def test_jobs_that_are_trained_alone_go_one_after_another() -> None:
    assert predict([planned(key=None)] * 3, pace(Slot(width=8), alone=0.5)) == Prediction([1, 1, 1], 60, 60)
    assert predict([planned()] * 3, pace(Slot(), Slot(), alone=0.5)) == Prediction([1, 1, 1], 40, 40)


def test_jobs_of_one_shape_are_predicted_as_cohorts() -> None:
    jobs = [planned()] * 5 + [planned("another")]
    found = predict(jobs, pace(Slot(width=4), alone=0.5, of_3=0.1))
    assert found == Prediction([4, 4, 4, 4, 1, 1], 4 * 40 * 0.1 + 2 * 20, 6 * 20)


def test_a_cohort_takes_as_long_as_its_longest_member() -> None:
    assert predict([planned(steps=4), planned(steps=6)], pace(Slot(width=2), of_2=0.1)).seconds == 2 * 60 * 0.1
    assert predict([planned(steps=4), planned(steps=9)], pace(Slot(width=2), alone=0.1)).together == [1, 1]


@pytest.mark.parametrize(
    ("n", "rates", "is_known"),
    [
        (4, {"of_2": 0.1}, True), (4, {"of_8": 0.1}, True), (5, {"of_2": 0.1}, False), (4, {"of_9": 0.1}, False),
        (2, {"alone": 0.1}, False), (1, {"of_2": 0.1}, False), (1, {}, False),
    ],
)  # fmt: skip
def test_the_time_of_a_cohort_is_predicted_from_those_of_about_its_size(
    n: int, rates: dict[str, float], is_known: bool
) -> None:
    found = predict([planned()] * n, pace(Slot(width=16), **rates))
    assert found.together == [n] * n
    assert (found.seconds is not None) == is_known


def test_the_memory_bounds_a_cohort_and_a_job_that_fits_nowhere_is_not_trained() -> None:
    slots = [Slot(memory_bytes=300, cohort_bytes=500, width=8)]  # of which company may take half
    jobs = [planned(training_bytes=100)] * 3
    assert predict(jobs, pace(*slots, alone=0.5)).together == [2, 2, 1]
    found = predict([*jobs, planned(training_bytes=301)], pace(*slots, alone=0.5, of_2=0.5))
    assert (found.together, found.seconds, found.seconds_alone) == ([2, 2, 1, None], None, None)


@pytest.mark.parametrize("changes", [{"steps": None}, {"params": None}])
def test_of_a_text_that_is_not_tokenised_no_time_is_known(changes: dict[str, None]) -> None:
    found = predict([planned(), planned(None, **changes)], pace(Slot(width=8), alone=0.5))
    assert found == Prediction([1, 1], None, None)


def test_slots_that_are_free_at_once_each_take_a_cohort() -> None:
    found = predict([planned()] * 6, pace(Slot(width=4), Slot(width=2), of_2=0.1, of_4=0.1))
    assert found == Prediction([4, 4, 4, 4, 2, 2], pytest.approx(16), None)
