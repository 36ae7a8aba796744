"""Leases that have passed, crashes, and clocks that jump, on SQLite and on PostgreSQL."""

import pytest
from sqlmodel import Session

from service.database.database import Database
from service.errors import LeaseLost
from service.jobs import queue, reads, recording
from service.jobs.lease import Claim
from service.jobs.rescuer import Rescuer
from service.jobs.tables import Checkpoint, Job
from service.jobs.workers import WorkerIdentity, is_alive, list_workers, worker_seen, worker_stopped
from tests.databases import Clock
from tests.queued import CHECKPOINT, LEASE, claim, running, submit
from tests.races import Races, at_once


def test_a_lease_that_holds_is_not_rescued(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    clock.advance(LEASE)
    assert queue.rescue(db) == []
    recording.heartbeat(db, held)


def test_a_job_whose_worker_is_gone_waits_and_counts_a_crash(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    (job,) = queue.rescue(db)
    assert (job.status, job.crashes, job.lease_until) == ("queued", 1, None)
    assert (job.waits_since, job.waits_seconds) == (clock.now, queue.BACKOFF.total_seconds())
    assert worker.id in (job.status_reason or "")
    assert queue.rescue(db) == []
    assert queue.claim(db, worker, LEASE) is None
    clock.advance(15)
    after = claim(db, worker)
    assert after.fence == held.fence + 1
    assert (after.job.waits_since, after.job.waits_seconds) == (None, None)


def test_a_lease_lost_by_a_worker_that_lives_counts_no_crash(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    worker_seen(db, worker.id)
    (job,) = queue.rescue(db)
    assert (job.status, job.crashes, job.waits_since, job.seq) == ("queued", 0, None, held.job.seq)


def test_a_worker_that_said_goodbye_is_gone(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    running(db, worker)
    clock.advance(LEASE + 1)
    worker_seen(db, worker.id)
    worker_stopped(db, worker.id)
    assert [job.crashes for job in queue.rescue(db)] == [1]


def test_a_rescued_job_obeys_what_was_asked_of_its_owner(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    cancelled, paused = running(db, worker), running(db, worker)
    queue.request_cancel(db, cancelled.job_id)
    queue.request_pause(db, cancelled.job_id)
    queue.request_pause(db, paused.job_id)
    clock.advance(LEASE + 1)
    assert [(job.id, job.status) for job in queue.rescue(db)] == [
        (cancelled.job_id, "cancelled"),
        (paused.job_id, "paused"),
    ]


def test_four_rescuers_at_once_move_a_job_once(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    expected = {running(db, worker).job_id for _ in range(10)}
    clock.advance(LEASE + 1)
    moved = [job.id for jobs in at_once([lambda: queue.rescue(db)] * 4) for job in jobs]
    assert len(moved) == 10
    assert set(moved) == expected
    assert {reads.get_job(db, job_id).crashes for job_id in expected} == {1}


def test_a_rescuer_passes_over_what_another_is_rescuing(
    db: Database, clock: Clock, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    first = races.hold(queue.rescue, db)
    second = races.start(queue.rescue, db)
    assert [job.id for job in first.let_go()] == [held.job_id]
    assert second.result() == []
    assert reads.get_job(db, held.job_id).crashes == 1


def test_a_heartbeat_that_comes_after_the_rescue_is_lost(
    db: Database, clock: Clock, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    rescue = races.hold(queue.rescue, db)
    heartbeat = races.start(recording.heartbeat, db, held)
    assert len(rescue.let_go()) == 1
    with pytest.raises(LeaseLost):
        heartbeat.result()


def test_a_heartbeat_that_comes_before_the_rescue_keeps_the_job(
    db: Database, clock: Clock, worker: WorkerIdentity, races: Races
) -> None:
    held = running(db, worker)
    clock.advance(LEASE + 1)
    heartbeat = races.hold(recording.heartbeat, db, held)
    rescue = races.start(queue.rescue, db)
    heartbeat.let_go()
    assert rescue.result() == []
    assert reads.get_job(db, held.job_id).status == "running"


def test_a_poison_job_is_given_up_after_three_crashes(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    job = submit(db)
    waits = []
    for _ in range(queue.MAX_CRASHES):
        job = queue.release(db, claim(db, worker), crash="signal 11")
        waits.append(job.waits_seconds)
        clock.advance(queue.MAX_BACKOFF.total_seconds())
    assert waits[:2] == [15, 30]
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "crashed_repeatedly"
    assert "signal 11" in job.error["message"]


def test_without_the_count_of_crashes_a_poison_job_goes_on_for_ever(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MAX_CRASHES", float("inf"))
    submit(db)
    for attempt in range(1, 21):
        held = claim(db, worker)
        assert held.job.attempt == attempt
        assert queue.release(db, held, crash="signal 9").status == "queued"
        clock.advance(queue.MAX_BACKOFF.total_seconds())


def test_without_telling_a_new_checkpoint_from_one_written_again_a_poison_job_goes_on_for_ever(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that always dies just after its first checkpoint."""
    get = Session.get
    monkeypatch.setattr(Session, "get", lambda self, row, key: None if row is Checkpoint else get(self, row, key))
    submit(db)
    for attempt in range(1, 2 * queue.MAX_CRASHES):
        held = claim(db, worker)
        assert held.job.attempt == attempt
        recording.record_checkpoint(db, held, percent=0, **CHECKPOINT)
        assert queue.release(db, held, crash="signal 9").status == "queued"
        clock.advance(queue.MAX_BACKOFF.total_seconds())


def test_the_wait_after_a_crash_doubles_up_to_a_quarter_of_an_hour(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MAX_CRASHES", 100)
    submit(db)
    waits = []
    for _ in range(8):
        job = queue.release(db, claim(db, worker), crash="signal 11")
        waits.append(job.waits_seconds)
        assert queue.claim(db, worker, LEASE) is None
        clock.advance(job.waits_seconds or 0)
    assert waits == [15, 30, 60, 120, 240, 480, 900, 900]


def test_a_new_checkpoint_forgets_crashes_and_one_written_again_does_not(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    submit(db)

    def crash(percent: int) -> Job:
        held = claim(db, worker)
        recording.record_checkpoint(db, held, percent=percent, **CHECKPOINT)
        job = queue.release(db, held, crash="signal 11")
        clock.advance(queue.MAX_BACKOFF.total_seconds())
        return job

    assert [crash(percent).crashes for percent in (0, 0, 25, 25)] == [1, 2, 1, 2]
    assert crash(25).status == "failed"


def test_a_drained_job_goes_on_first_and_counts_no_crash(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    submit(db)
    job = queue.release(db, held)
    assert (job.status, job.crashes, job.waits_since) == ("queued", 0, None)
    assert claim(db, worker).job_id == job.id


def test_an_end_that_is_not_the_jobs_doing_waits_and_counts_no_crash(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    submit(db)
    for _ in range(2 * queue.MAX_CRASHES):
        job = queue.release(db, claim(db, worker), external_cause="no file can be opened")
        assert (job.status, job.crashes, job.waits_seconds) == ("queued", 0, 15)
        assert "no file can be opened" in (job.status_reason or "")
        clock.advance(15)


def test_a_back_off_is_over_when_the_clock_was_set_back_to_before_it(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    clock.advance(7200)
    job = queue.release(db, running(db, worker), crash="signal 11")
    clock.advance(-7200)
    assert claim(db, worker).job_id == job.id


def test_a_worker_last_seen_by_a_clock_that_was_ahead_is_neither_alive_nor_gone(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    clock.advance(7200)
    running(db, worker)
    worker_seen(db, worker.id)
    clock.advance(-7200)
    row = list_workers(db)[0][0]
    assert not is_alive(row, clock.now)
    assert [job.crashes for job in queue.rescue(db)] == [0]
    worker_seen(db, worker.id)
    assert is_alive(list_workers(db)[0][0], clock.now)


def test_a_lease_too_far_ahead_has_passed(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    """The clock was wrong when the lease was taken, and has been set back since."""
    held = running(db, worker)
    clock.advance(-LEASE)
    assert queue.rescue(db) == []
    clock.advance(-1)
    assert [job.id for job in queue.rescue(db)] == [held.job_id]


def test_leases_of_different_lengths_are_told_apart(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    submit(db)
    long = queue.claim(db, worker, 10 * LEASE)
    short = running(db, worker)
    assert long is not None
    clock.advance(LEASE + 1)
    assert [job.id for job in queue.rescue(db)] == [short.job_id]


def test_a_rescuer_that_slept_skips_a_round(db: Database, clock: Clock, worker: WorkerIdentity) -> None:
    """A laptop was closed: the leases look past, but their owners are about to go on."""
    rescuer = Rescuer(db, 15)
    held = running(db, worker)
    assert rescuer.round() == []
    clock.advance(3600)
    assert rescuer.round() == []
    recording.heartbeat(db, held)
    clock.advance(15)
    assert rescuer.round() == []
    assert reads.get_job(db, held.job_id).status == "running"


def test_a_rescuer_that_slept_still_rescues_who_does_not_come_back(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    rescuer = Rescuer(db, 15)
    held = running(db, worker)
    rescuer.round()
    clock.advance(3600)
    assert rescuer.round() == []
    clock.advance(15)
    assert [job.id for job in rescuer.round()] == [held.job_id]


def test_a_rescuer_skips_a_round_when_the_clock_was_set_back(
    db: Database, clock: Clock, worker: WorkerIdentity
) -> None:
    rescuer = Rescuer(db, 15)
    held = running(db, worker)
    rescuer.round()
    clock.advance(-3600)
    assert rescuer.round() == []
    recording.heartbeat(db, held)
    clock.advance(15)
    assert rescuer.round() == []


def live_through_a_jump(db: Database, clock: Clock, worker: WorkerIdentity, jump: float, phase: int) -> Claim:
    """A minute of a job whose owner keeps it alive, of which two rescuers see a jump of the clock after `phase`."""
    held = running(db, worker)
    rescuers = [Rescuer(db, 15), Rescuer(db, 15)]
    for second in range(60):
        if second == 20 + phase:
            clock.advance(jump)
        if second % 10 == 0:
            try:
                recording.heartbeat(db, held)
                worker_seen(db, worker.id)
            except LeaseLost:
                break
        for offset, rescuer in enumerate(rescuers):
            if second % 15 == 7 * offset:
                rescuer.round()
        clock.advance(1)
    return held


@pytest.mark.parametrize("jump", [30, 3600, -70, -1e9])
def test_a_clock_that_jumps_takes_no_job_from_an_owner_who_lives(
    db: Database, clock: Clock, worker: WorkerIdentity, jump: float
) -> None:
    for phase in (1, 8):
        held = live_through_a_jump(db, clock, worker, jump, phase)
        job = reads.get_job(db, held.job_id)
        assert (job.status, job.fence, job.crashes) == ("running", 1, 0), f"after {phase} s"
        queue.finish(db, held, "succeeded")


@pytest.mark.parametrize("jump", [3600, -3600])
def test_without_the_skipped_round_a_clock_that_jumps_takes_a_job_from_its_owner(
    db: Database, clock: Clock, worker: WorkerIdentity, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    monkeypatch.setattr(Rescuer, "round", lambda self: queue.rescue(db))
    job = reads.get_job(db, live_through_a_jump(db, clock, worker, jump, 1).job_id)
    assert (job.status, job.fence) == ("queued", 1)
    assert job.crashes == (jump > 0)  # a worker that was last seen an hour ago looks gone, too
