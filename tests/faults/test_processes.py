"""Processes that die, stop or do not end, at the worst moment: what must hold then, and what protects it.

Real workers over real databases. Each protection is also taken away once, to show that its fault then does harm.
"""

import signal
import sys
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest

from nanomoe import checkpoint
from service.jobs import queue, reads
from service.jobs.tables import Job
from tests.databases import EITHER, ONLY_SQLITE
from tests.worker.scripted_trainer import SAFEGUARDS
from tests.worker.workplace import HERE, QUICK, SHORT_LEASE, Workplace, ended_within, is_alive, trainers_of


def _is_whole(steps: list[int]) -> bool:
    return bool(steps) and steps == list(range(1, len(steps) + 1))


# A trainer dies


@EITHER
def test_a_job_whose_trainer_was_killed_goes_on_from_its_snapshot(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("die_once")
    place.wait_until(lambda: place.job(job).fence == 2)
    place.wait_for_step(job, 20)
    place.finish(job)
    done = place.wait_for(job, "succeeded")
    assert (done.attempt, done.crashes) == (2, 0)  # a new checkpoint forgets the crash
    assert place.statuses(job) == ["queued", "running", "queued", "running", "succeeded"]
    # Steps 6 to 12 were recorded before the crash and trained again after it: no gap, no duplicate.
    assert _is_whole(place.recorded_steps(job)[:-1])
    assert {"code": "resumed", "message": "attempt 2 goes on from step 5"} in place.events(job, "warning")


@EITHER
def test_a_poison_job_fails_after_three_crashes(place: Workplace) -> None:
    poison = place.submit()
    place.start_worker("die")
    failed = place.wait_for(poison, "failed")
    assert failed.error is not None
    assert failed.error["code"] == "crashed_repeatedly"
    assert "SIGKILL" in failed.error["message"]
    assert failed.attempt == 3


@ONLY_SQLITE
def test_a_crashed_job_waits_before_it_is_tried_again(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("die", backoff_seconds=600)
    place.wait_until(lambda: place.job(job).crashes == 1)
    waiting = place.job(job)
    assert waiting.status == "queued"
    assert (waiting.run_at, waiting.waits_seconds) == (None, 600)


@ONLY_SQLITE
def test_a_step_that_never_ends_is_stalled_and_tried_again(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("stalled", timing=replace(QUICK, stall=0.5))
    place.wait_until(lambda: place.job(job).fence == 2)
    place.finish(job)
    place.wait_for(job, "succeeded")
    reasons = [data["status_reason"] or "" for data in place.events(job, "status")]
    assert any("stalled" in reason for reason in reasons)


@ONLY_SQLITE
def test_a_damaged_snapshot_is_not_trusted_and_training_starts_again(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("work")
    place.wait_for_step(job, 10)
    queue.request_pause(place.db, job.id)
    place.wait_for(job, "paused")
    snapshot = reads.find_snapshot(place.db, job.id)
    assert snapshot is not None
    file = place.settings.data_dir / snapshot.folder / "step"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    queue.resume(place.db, job.id)
    place.wait_until(lambda: place.job(job).fence == 2)
    place.finish(job)
    place.wait_for(job, "succeeded")
    codes = [event["code"] for event in place.events(job, "warning")]
    assert "snapshot_damaged" in codes
    assert {"code": "resumed", "message": "attempt 2 goes on from step 0"} in place.events(job, "warning")


# An end that is not the job's doing


@ONLY_SQLITE
@pytest.mark.parametrize("script", ["storage_failed", "hung_up"])
def test_an_end_by_an_external_cause_is_no_crash(place: Workplace, script: str) -> None:
    job = place.submit()
    place.start_worker(script)
    place.wait_until(lambda: place.job(job).fence == 5)
    place.finish(job)
    done = place.wait_for(job, "succeeded", "failed")
    assert (done.status, done.attempt, done.crashes) == ("succeeded", 5, 0)


@ONLY_SQLITE
def test_a_trainer_that_kills_itself_without_keep_alive_has_not_crashed(place: Workplace) -> None:
    """The supervisor's main thread stands still, while others go on: a machine with too much to do."""
    job = place.submit()
    place.start_worker("work", without=("keep-alive",), timing=SHORT_LEASE)
    place.wait_until(lambda: place.job(job).fence == 2)
    reasons = [data["status_reason"] or "" for data in place.events(job, "status")]
    assert any("killed itself" in reason for reason in reasons)
    assert place.job(job).crashes == 0


@ONLY_SQLITE
def test_a_supervisor_that_cannot_use_the_data_folder_counts_no_crash(place: Workplace) -> None:
    job = place.submit()
    jobs = place.settings.data_dir / "jobs"
    jobs.rmdir() if jobs.exists() else None
    jobs.write_bytes(b"in the folder's place")
    place.start_worker("succeed")
    place.wait_until(lambda: place.job(job).fence > queue.MAX_CRASHES)
    assert place.job(job).crashes == 0
    jobs.unlink()
    done = place.wait_for(job, "succeeded", "failed")
    assert (done.status, done.crashes) == ("succeeded", 0)


# Memory runs out


@EITHER
def test_a_job_whose_trainer_was_killed_out_of_memory_continues_with_smaller_micro_batches(place: Workplace) -> None:
    job = place.submit(batch_size=8, block_size=2)  # 5 windows
    place.start_worker("out_of_memory")
    place.wait_until(lambda: place.job(job).fence == 3)
    place.finish(job)
    done = place.wait_for(job, "succeeded")
    assert (done.attempt, done.crashes) == (3, 0)
    assert done.execution == {"device": "cpu", "n_threads": 1, "micro_batch": 2}
    told = [event["message"] for event in place.events(job, "warning") if event["code"] == "micro_batch_halved"]
    assert ["of 5 windows" in told[0], "of 3 windows" in told[1], len(told)] == [True, True, 2]
    assert [event["code"] for event in place.events(job, "warning")].count("resume_not_exact") == 2
    reasons = [data["status_reason"] for data in place.events(job, "status") if data["status"] == "queued"]
    assert reasons[1:] == [f"memory ran out, goes on with micro-batches of {n} windows" for n in (3, 2)]


@ONLY_SQLITE
@pytest.mark.parametrize(
    ("script", "config", "attempts", "said"),
    [
        ("out_of_memory_always", {"batch_size": 2}, 2, "not even one window of 2 tokens"),
        ("out_of_memory_always", {"batch_size": 2, "use_moe": True, "capacity_factor": 1.0}, 1, "capacity_factor"),
        ("out_of_memory_at_the_start", {"batch_size": 2}, 1, "not even the model"),
    ],
)
def test_a_job_too_large_for_the_memory_fails_with_its_figures(
    place: Workplace, script: str, config: dict[str, Any], attempts: int, said: str
) -> None:
    job = place.submit(block_size=2, **config)
    place.start_worker(script)
    failed = place.wait_for(job, "failed")
    assert failed.error is not None
    assert (failed.error["code"], failed.attempt, failed.crashes) == ("out_of_memory", attempts, 0)
    assert said in failed.error["message"]
    assert "batch_size 2, block_size 2" in failed.error["message"]


# Grandchildren


@ONLY_SQLITE
def test_orphan_grandchildren_are_gone_before_the_next_claim(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("orphans")
    place.wait_until(lambda: place.job(job).fence == 2)
    assert len((place.folder(job) / "children").read_text().split()) == 2
    assert place.children_left(job) == []


@ONLY_SQLITE
def test_without_kill_and_reap_and_the_lock_grandchildren_live_beside_the_next_attempt(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("orphans", without=("kill and reap", "the slot's lock"))
    place.wait_until(lambda: place.job(job).fence == 2)
    left = place.children_left(job)
    assert left
    for pid in left:
        psutil.Process(pid).kill()


@ONLY_SQLITE
def test_orphans_of_a_killed_worker_are_killed_before_its_slot_is_used_again(place: Workplace) -> None:
    job = place.submit()
    worker = place.start_worker("orphans", without=("kill and reap",), timing=SHORT_LEASE)
    place.wait_until(lambda: place.children_left(job) and place.job(job).status == "queued")
    worker.signal(signal.SIGKILL)
    worker.wait()
    # One of the two still holds the slot's lock, which is how the next worker finds both.
    assert place.children_left(job)
    place.start_worker("work", timing=SHORT_LEASE)
    place.wait_until(lambda: place.job(job).fence == 2)
    assert place.children_left(job) == []


# A supervisor dies


@EITHER
def test_killing_the_supervisor_kills_its_trainer_within_a_second(place: Workplace) -> None:
    job = place.submit()
    worker = place.start_worker("unstoppable")
    place.wait_for_step(job)
    trainer = place.trainer(job)
    worker.signal(signal.SIGKILL)
    worker.wait()
    assert ended_within(1, trainer)


@ONLY_SQLITE
@pytest.mark.skipif(sys.platform != "linux", reason="the ties are taken away by what only Linux has")
def test_without_safeguards_a_trainer_outlives_its_supervisor_and_the_lease(place: Workplace) -> None:
    unsafe = [option for safeguard in SAFEGUARDS for option in ("--without", safeguard)]
    job = place.submit()
    worker = place.start_worker(program=[str(HERE / "scripted_trainer.py"), "stalled", *unsafe], timing=SHORT_LEASE)
    place.wait_for_step(job)
    trainer = place.trainer(job)
    worker.signal(signal.SIGKILL)
    worker.wait()
    place.wait_until(lambda: queue.rescue(place.db))
    assert place.job(job).status == "queued"
    assert is_alive(trainer.pid)  # while the job may be claimed on another device
    trainer.kill()


@EITHER
def test_another_worker_takes_over_the_job_of_a_killed_one(place: Workplace) -> None:
    job = place.submit()
    worker = place.start_worker("work", timing=SHORT_LEASE)
    place.wait_for_step(job, 5)
    worker.signal(signal.SIGKILL)
    worker.wait()
    began = time.monotonic()
    place.start_worker("work", timing=SHORT_LEASE)
    place.wait_until(lambda: place.job(job).fence == 2)
    assert time.monotonic() - began < 20
    place.wait_until(lambda: place.events(job, "warning"))  # it tells where it goes on, and forgets the steps past it
    place.wait_until(lambda: len(place.recorded_steps(job)) >= 5)
    place.finish(job)
    done = place.wait_for(job, "succeeded")
    assert done.attempt == 2
    assert _is_whole(place.recorded_steps(job)[:-1])


# A supervisor stops, and comes back


@EITHER
def test_a_supervisor_that_stopped_past_its_lease_writes_nothing_when_it_comes_back(place: Workplace) -> None:
    job = place.submit()
    stopped = place.start_worker("work", device="cpu:0", timing=SHORT_LEASE)
    place.wait_for_step(job, 5)
    old_trainer = place.trainer(job, 1)
    stopped.stop_between_transactions(place)
    place.start_worker("work", device="cpu:1", timing=SHORT_LEASE)
    place.wait_until(lambda: place.job(job).fence == 2)
    assert not is_alive(old_trainer.pid)  # it ended itself before the lease did
    stopped.signal(signal.SIGCONT)
    place.wait_for_step(job, 5)
    new_trainer = place.trainer(job, 2)
    place.wait_until(lambda: is_idle(stopped.pid))
    assert is_alive(new_trainer.pid)
    assert place.job(job).fence == 2
    place.finish(job)
    done = place.wait_for(job, "succeeded")
    assert done.attempt == 2
    assert place.statuses(job) == ["queued", "running", "queued", "running", "succeeded"]
    assert all(row.fence == 2 for row in reads.list_checkpoints(place.db, job.id))


def is_idle(supervisor: int) -> bool:
    """Whether a supervisor has a trainer again that has no job."""
    return len(trainers_of(supervisor)) == 1


@ONLY_SQLITE
def test_a_device_whose_trainer_is_stopped_is_not_used_by_another_worker(place: Workplace) -> None:
    job = place.submit()
    stopped = place.start_worker("work", timing=SHORT_LEASE)
    place.wait_for_step(job)
    trainer = place.trainer(job)
    stopped.stop_between_transactions(place)
    trainer.suspend()  # it cannot end itself now, and holds its device
    place.start_worker("work", timing=SHORT_LEASE)
    place.wait_for(job, "queued")
    with pytest.raises(AssertionError, match="in vain"):
        place.wait_until(lambda: place.job(job).fence == 2, timeout=2)
    trainer.resume()
    place.wait_until(lambda: place.job(job).fence == 2)
    assert not is_alive(trainer.pid)


@ONLY_SQLITE
def test_without_the_slot_lock_two_trainers_share_a_device(place: Workplace) -> None:
    job = place.submit()
    stopped = place.start_worker("work", timing=SHORT_LEASE)
    place.wait_for_step(job)
    trainer = place.trainer(job)
    stopped.stop_between_transactions(place)
    trainer.suspend()
    place.start_worker("work", without=("the slot's lock",), timing=SHORT_LEASE)
    place.wait_until(lambda: place.job(job).fence == 2)
    assert is_alive(trainer.pid)


# The database is out of reach


@ONLY_SQLITE
def test_a_worker_that_cannot_reach_the_database_ends_its_trainer_before_the_lease_ends(place: Workplace) -> None:
    job = place.submit()
    log = place.settings.data_dir / "worker.log"
    place.start_worker("work", timing=SHORT_LEASE, log=log)
    place.wait_for_step(job)
    trainer = place.trainer(job)
    with place.write_lock_held():
        lease_until = place.job(job).lease_until
        assert lease_until is not None
        assert ended_within(30, trainer)
        assert place.db.time() < lease_until
    # A supervisor that waits for the database still sends keep-alives: it killed the trainer, not the trainer itself.
    assert "lease_deadline_passed" in log.read_text()
    assert "supervisor_lost" not in log.read_text()
    place.wait_until(lambda: place.job(job).fence == 2)
    assert place.job(job).crashes == 0
    place.finish(job)
    place.wait_for(job, "succeeded")


@ONLY_SQLITE
def test_without_the_deadline_a_trainer_outlives_its_lease(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("work", without=("the deadline",), timing=SHORT_LEASE)
    place.wait_for_step(job)
    trainer = place.trainer(job)
    with place.write_lock_held():
        lease_until = place.job(job).lease_until
        assert lease_until is not None
        place.wait_until(lambda: place.db.time() > lease_until)
        assert is_alive(trainer.pid)


# Many at once


@ONLY_SQLITE
def test_three_workers_end_every_job_exactly_once(place: Workplace) -> None:
    jobs: list[Job] = [place.submit() for _ in range(9)]
    for n in range(3):
        place.start_worker("succeed", device=f"cpu:{n}", timing=SHORT_LEASE)
    for job in jobs:
        done = place.wait_for(job, "succeeded", timeout=60)
        assert done.attempt == 1
        assert place.statuses(job).count("succeeded") == 1
        for row in reads.list_checkpoints(place.db, job.id):
            checkpoint.verify(place.settings.data_dir / row.folder, row.manifest_sha256)
