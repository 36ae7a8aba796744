"""The supervisor, its slots and its attempts: real processes over real databases, with scripted trainers."""

import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from nanomoe.config import JobConfig
from nanomoe.store.local import LocalStore
from nanomoe.training.execution import Execution
from service.database.schema import REVISION
from service.jobs import queue, reads
from service.jobs.reads import load_job
from service.jobs.rescuer import Rescuer
from service.jobs.tables import Job
from service.jobs.workers import list_workers
from service.storage.installation import join_installation
from tests.databases import EITHER, ONLY_SQLITE
from tests.worker.workplace import HERE, QUICK, Workplace, is_alive
from worker.devices import find_devices
from worker.supervisor import Supervisor

EXECUTION = {"device": "cpu", "n_threads": 1, "micro_batch": JobConfig().batch_size}


@EITHER
def test_a_job_is_trained_to_its_end_and_every_message_is_recorded(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("work")
    place.wait_for_step(job, 5)
    place.finish(job)
    done = place.wait_for(job, "succeeded")
    assert place.statuses(job) == ["queued", "running", "succeeded"]
    assert (done.attempt, done.crashes, done.total_steps, done.execution) == (1, 0, 100, EXECUTION)
    assert done.progress["step"] == 100
    assert done.progress["percent"] == 100
    assert [(row.percent, row.folder) for row in reads.list_checkpoints(place.db, job.id)] == [
        (0, f"jobs/{job.id}/f1-0"),
        (100, f"jobs/{job.id}/f1-100"),
    ]
    assert place.recorded_steps(job)[:5] == [1, 2, 3, 4, 5]


@ONLY_SQLITE
def test_a_worker_that_has_been_idle_ends_and_one_with_a_job_does_not(place: Workplace) -> None:
    job = place.submit()
    worker = place.start_worker("work", idle_seconds=0.2)
    place.wait_for_step(job, 5)
    assert worker.wait(1) is None
    place.finish(job)
    assert worker.wait(120) == 0
    assert place.job(job).status == "succeeded"
    (row,) = [row for row, _ in list_workers(place.db)]
    assert row.stopped_at is not None


@ONLY_SQLITE
def test_a_job_that_needed_fewer_steps_says_why(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("succeed_early")
    done = place.wait_for(job, "succeeded")
    assert done.progress["step"] == 42
    assert done.status_reason == "stopped early at step 42: perplexity 1.987"


@EITHER
def test_an_idle_worker_is_woken_by_a_submission(place: Workplace) -> None:
    # It looks by itself only every minute: whoever finds the job at once was woken.
    place.start_worker("succeed", timing=replace(QUICK, retry=60.0))
    first = place.submit()
    place.wait_for(first, "succeeded", timeout=50)
    worker = place.wait_until(lambda: list_workers(place.db))[0][0]
    assert worker.stopped_at is None
    second = place.submit()
    place.wait_for(second, "running", "succeeded", timeout=20)


@ONLY_SQLITE
def test_two_slots_train_two_jobs_at_once(place: Workplace) -> None:
    jobs = [place.submit() for _ in range(2)]
    place.start_worker("work", slots=2)
    for job in jobs:
        place.wait_for_step(job)
    assert [place.job(job).status for job in jobs] == ["running", "running"]


@EITHER
def test_a_running_job_is_cancelled_within_two_seconds(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("work", timing=replace(QUICK, cancel_grace=5.0))
    place.wait_for_step(job)
    trainer = place.trainer(job)
    began = time.monotonic()
    queue.request_cancel(place.db, job.id)
    place.wait_for(job, "cancelled")
    assert time.monotonic() - began < 2
    steps = place.recorded_steps(job)
    following = place.submit()
    place.wait_for_step(following)
    assert place.trainer(following) == trainer
    assert place.recorded_steps(job) == steps


@ONLY_SQLITE
def test_a_trainer_that_ignores_sigterm_is_killed_and_only_then_is_the_job_cancelled(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("unstoppable")
    place.wait_for_step(job)
    trainer = place.trainer(job)
    assert len(place.children_left(job)) == 1
    queue.request_cancel(place.db, job.id)
    place.wait_until(lambda: place.job(job).status == "cancelled")
    assert not is_alive(trainer.pid)
    assert place.children_left(job) == []


@ONLY_SQLITE
def test_a_paused_job_leaves_a_snapshot_and_goes_on_from_it(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("work")
    place.wait_for_step(job, 10)
    queue.request_pause(place.db, job.id)
    place.wait_for(job, "paused")
    snapshot = reads.find_snapshot(place.db, job.id)
    assert snapshot is not None
    assert snapshot.step >= 10
    assert place.recorded_steps(job) == list(range(1, snapshot.step + 1))
    queue.resume(place.db, job.id)
    place.wait_for_step(job, snapshot.step + 1)
    assert any(event["code"] == "resumed" for event in place.events(job, "warning"))
    steps = place.recorded_steps(job)
    assert steps == list(range(1, len(steps) + 1))
    assert place.job(job).crashes == 0


@ONLY_SQLITE
def test_a_drained_worker_puts_its_job_back_without_counting_a_crash(place: Workplace) -> None:
    job = place.submit()
    worker = place.start_worker("work")
    place.wait_for_step(job, 5)
    trainer = place.trainer(job)
    worker.signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    after = place.job(job)
    assert (after.status, after.crashes) == ("queued", 0)
    assert reads.find_snapshot(place.db, job.id) is not None
    assert not is_alive(trainer.pid)
    assert list_workers(place.db)[0][0].stopped_at is not None


@ONLY_SQLITE
def test_a_second_sigterm_ends_a_worker_whose_trainer_does_not_stop(place: Workplace) -> None:
    job = place.submit()
    worker = place.start_worker("unstoppable", timing=replace(QUICK, stop_grace=600.0))
    place.wait_for_step(job)
    worker.signal(signal.SIGTERM)
    time.sleep(2 * QUICK.tick)  # two signals at once are one
    worker.signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert place.job(job).status == "queued"
    assert place.children_left(job) == []


@ONLY_SQLITE
def test_a_worker_whose_rescue_fails_puts_its_job_back_and_ends(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = place.submit()

    def broken(rescuer: Rescuer) -> list[Job]:
        if place.job(job).progress.get("step"):
            raise RuntimeError("a bug")
        return []

    monkeypatch.setattr(Rescuer, "round", broken)
    command = [sys.executable, str(HERE / "scripted_trainer.py"), "work"]
    supervisor = Supervisor(place.db, find_devices("cpu"), place.settings, timing=QUICK, command=command)
    assert supervisor.run() == 1
    assert place.job(job).status == "queued"
    assert reads.find_snapshot(place.db, job.id) is not None


@ONLY_SQLITE
def test_every_attempt_whose_execution_differs_from_the_first_one_warns(place: Workplace) -> None:
    job = place.submit(tokenizer="bytes", block_size=8, n_layer=1, n_head=1, n_embd=8, epochs=1)
    here = Execution.decide(JobConfig(), "cpu", n_tokens=28).model_dump(mode="json")
    with place.db.write() as session:
        load_job(session, job.id).execution = here | {"torch_version": "1.0"}
    place.start_worker()
    done = place.wait_for(job, "succeeded")
    said = "this attempt computes otherwise than the first one did: torch_version: 1.0 -> "
    for told in (done.warnings, place.events(job, "warning")):
        assert [warning["code"] for warning in told if warning["message"].startswith(said)] == ["resume_not_exact"]


@ONLY_SQLITE
@pytest.mark.parametrize(
    ("script", "status", "code"), [("fail", "failed", "loss_not_finite"), ("disk_full", "paused", None)]
)
def test_the_final_message_of_a_trainer_decides_the_status(
    place: Workplace, script: str, status: str, code: str | None
) -> None:
    job = place.submit()
    place.start_worker(script)
    ended = place.wait_for(job, "failed", "paused", "succeeded")
    assert ended.status == status
    assert (ended.error or {}).get("code") == code
    if status == "paused":
        assert ended.status_reason == "because of disk_full"


@ONLY_SQLITE
def test_a_trainer_of_slow_steps_has_twenty_of_them_before_it_counts_as_stalled(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("slow_steps", timing=replace(QUICK, stall=1.0))
    place.wait_for(job, "succeeded", "failed")
    assert place.job(job).status == "succeeded"


@ONLY_SQLITE
def test_a_trainer_that_violates_the_protocol_has_crashed(place: Workplace) -> None:
    job = place.submit()
    place.start_worker("protocol_error", backoff_seconds=60)
    place.wait_until(lambda: place.job(job).crashes == 1)
    assert "violated the protocol" in (place.job(job).status_reason or "")


def start_worker_that_waits(place: Workplace) -> None:
    """Until it has looked at the database, and has not entered the list of workers."""
    log = place.settings.data_dir / "worker.log"
    worker = place.start_worker("succeed", log=log)
    place.wait_until(lambda: log.exists() and "waiting_for_database" in log.read_text())
    assert worker.wait(0) is None
    assert list_workers(place.db) == []


@ONLY_SQLITE
def test_the_worker_waits_for_its_schema_revision(place: Workplace) -> None:
    job = place.submit()
    with place.db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'older'")
    start_worker_that_waits(place)
    with place.db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = ?", (REVISION,))
    place.wait_for(job, "succeeded")


@ONLY_SQLITE
def test_the_worker_waits_for_an_api_that_has_only_migrated_yet(place: Workplace) -> None:
    job = place.submit()
    with place.db.write() as session:
        session.connection().exec_driver_sql("DELETE FROM installation")
    start_worker_that_waits(place)
    join_installation(place.db, LocalStore(place.settings.data_dir), create=True)
    place.wait_for(job, "succeeded")


@ONLY_SQLITE
def test_a_worker_drains_when_the_schema_moves_on(place: Workplace) -> None:
    worker = place.start_worker("work")
    job = place.submit()
    place.wait_for_step(job)
    with place.db.write() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = 'newer'")
    place.finish(job)
    assert worker.wait(20) == 0


@ONLY_SQLITE
def test_a_worker_sweeps_what_has_had_no_row_for_a_day_and_leaves_its_jobs_alone(place: Workplace) -> None:
    job = place.submit()
    folders = place.settings.data_dir / "jobs"
    old, new = folders / ("a" * 32), folders / ("b" * 32)
    for folder in (old, new):
        folder.mkdir(parents=True)
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    place.start_worker("succeed")
    place.wait_until(lambda: not old.exists())
    place.wait_for(job, "succeeded")
    assert new.exists()
    assert place.folder(job).exists()
