"""Events of many jobs on both databases: read in one order, whatever order their transactions commit in."""

import sqlalchemy as sa

from service.database.database import Database
from service.jobs import queue, reads, recording
from service.jobs.numbered_events import EventFilter, EventReader
from service.jobs.submit import submit_sweep
from service.jobs.workers import WorkerIdentity
from tests.queued import CHECKPOINT, STEPS, claim, running, submit
from tests.races import Races, at_once
from tests.service.jobs.test_sweeps import jobs_of, new_sweep, submitted

ALL = EventFilter()


def seen(reader: EventReader, limit: int = 1000) -> list[tuple[str, str]]:
    """What the next call of a reader gives: the job and the kind or status of each event."""
    events, _ = reader.read(limit)
    assert [event.number for event in events] == sorted(event.number for event in events)
    return [(event.job_id, event.data.get("status", event.kind)) for event in events]


def test_the_events_of_all_jobs_are_read_in_their_order(db: Database, worker: WorkerIdentity) -> None:
    reader = EventReader(db, ALL, 0)
    one = running(db, worker)
    recording.record_event(db, one, "warning", {"code": "c", "message": "m"})
    other = submit(db)
    recording.record_checkpoint(db, one, percent=0, **CHECKPOINT)
    queue.finish(db, one, "succeeded")
    queue.request_cancel(db, other.id)
    expected = [
        (one.job_id, "queued"), (one.job_id, "running"), (one.job_id, "warning"), (other.id, "queued"),
        (one.job_id, "checkpoint"), (one.job_id, "succeeded"), (other.id, "cancelled"),
    ]  # fmt: skip
    assert seen(reader, 4) == expected[:4]
    assert reader.has_more
    assert seen(reader, 4) == expected[4:]
    assert seen(reader) == []
    for place, event in enumerate(EventReader(db, ALL, 0).read()[0], start=1):
        assert seen(EventReader(db, ALL, event.number)) == expected[place:]


def test_a_filter_picks_a_sweep_or_a_tag(db: Database, worker: WorkerIdentity) -> None:
    tagged, _ = submit(db, tags={"course": "nlp"}), submit(db, tags={"course": "other"})
    sweep = submitted(db, 2)
    ids = [job.id for job in jobs_of(db, sweep)]
    assert [job_id for job_id, _ in seen(EventReader(db, EventFilter(sweep_id=sweep.id), 0))] == ids
    assert [job_id for job_id, _ in seen(EventReader(db, EventFilter(tag=("course", "nlp")), 0))] == [tagged.id]
    assert len(seen(EventReader(db, EventFilter(tag=("course", None)), 0))) == 2
    recording.record_steps(db, claim(db, worker), STEPS, {"step": 2})
    for wanted, steps in ((ALL, [2]), (EventFilter(tag=("course", "nlp")), [2]), (EventFilter(sweep_id=sweep.id), [])):
        assert [job.progress["step"] for job in EventReader(db, wanted, None).read()[1]] == steps


def test_a_reader_without_a_number_begins_with_what_comes_next(db: Database) -> None:
    submit(db)
    reader = EventReader(db, ALL, None)
    assert reader.begin()
    job = submit(db)
    assert seen(reader) == [(job.id, "queued")]


def test_a_number_of_another_database_is_no_reason_to_wait_for_it(db: Database) -> None:
    submit(db)
    reader = EventReader(db, ALL, 10**9)
    assert seen(reader) == []
    job = submit(db)
    assert seen(reader) == [(job.id, "queued")]


def test_a_number_is_not_given_twice_when_the_newest_events_are_deleted(db: Database) -> None:
    first, last = submit(db), submit(db)
    queue.request_cancel(db, last.id)
    reader = EventReader(db, ALL, 0)
    assert len(seen(reader)) == 3
    queue.delete(db, last.id)
    queue.request_cancel(db, first.id)
    assert seen(reader) == [(first.id, "cancelled")]


def test_an_event_that_commits_late_is_not_passed_over(db: Database, worker: WorkerIdentity, races: Races) -> None:
    one, other = running(db, worker), running(db, worker)
    reader = EventReader(db, ALL, None)
    assert reader.begin()
    first = races.hold(queue.finish, db, one, "succeeded")
    second = races.start(queue.finish, db, other, "succeeded")
    if not db.is_sqlite:  # which has one writer: there the second waits for the first
        second.result()
        assert reads.get_job(db, other.job_id).status == "succeeded"
        assert seen(reader) == []
        assert reader.is_behind
    first.let_go()
    second.result()
    assert seen(reader) == [(one.job_id, "succeeded"), (other.job_id, "succeeded")]
    assert not reader.is_behind


def test_who_begins_during_a_transaction_waits_for_it_and_for_no_later_one(
    db: Database, worker: WorkerIdentity, races: Races
) -> None:
    one, other = running(db, worker), running(db, worker)
    first = races.hold(queue.finish, db, one, "succeeded")
    reader = EventReader(db, ALL, None)
    assert reader.begin() == db.is_sqlite
    if db.is_sqlite:  # whose events are numbered in the order of their commits
        first.let_go()
        assert seen(reader) == [(one.job_id, "succeeded")]
        return
    second = races.hold(queue.finish, db, other, "succeeded")
    first.let_go()
    assert reader.begin()
    assert seen(reader) == []
    second.let_go()
    assert seen(reader) == [(other.job_id, "succeeded")]


def test_a_transaction_that_is_rolled_back_or_writes_no_event_is_not_waited_for(
    db: Database, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    reader = EventReader(db, ALL, None)
    assert reader.begin()
    with db.engine.connect() as elsewhere, elsewhere.begin() as transaction:
        if not db.is_sqlite:
            elsewhere.execute(sa.text("SELECT pg_current_xact_id()"))  # it has begun to write
            elsewhere.execute(sa.text("UPDATE counters SET value = value + 1 WHERE name = 'unknown'"))
        queue.finish(db, held, "succeeded")
        assert seen(reader) == [(held.job_id, "succeeded")]
        if not db.is_sqlite:
            elsewhere.execute(
                sa.text(
                    "INSERT INTO events (job_id, seq, number, kind, created_at, data) "
                    "VALUES (:job, 99, nextval('event_numbers'), 'warning', 0, '{}')"
                ),
                {"job": held.job_id},
            )
        job = submit(db)
        assert seen(reader) == ([(job.id, "queued")] if db.is_sqlite else [])
        transaction.rollback()
    assert seen(reader) == ([] if db.is_sqlite else [(job.id, "queued")])


def test_readers_beside_many_writers_miss_nothing(db: Database, worker: WorkerIdentity) -> None:
    """Four write, while one reads: it gets each event once, in the order in which everybody reads them afterwards."""
    reader = EventReader(db, ALL, 0)
    found: list[tuple[str, str]] = []

    def write() -> None:
        for _ in range(10):
            job = submit(db)
            queue.request_pause(db, job.id)
            queue.request_cancel(db, job.id)

    def read() -> None:
        while len(found) < 120:
            found.extend(seen(reader, 7))

    at_once([write, write, write, write, read])
    assert found == seen(EventReader(db, ALL, 0))


def test_two_sweeps_at_once_are_numbered_without_a_gap_in_what_is_read(db: Database) -> None:
    at_once([lambda: submit_sweep(db, new_sweep(20)) for _ in range(4)])
    assert len(seen(EventReader(db, ALL, 0))) == 80
