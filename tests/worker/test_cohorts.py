"""Several jobs of one shape, trained together by one trainer: each its own attempt, as if it ran alone."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from nanomoe.config import JobConfig
from nanomoe.training.steps.choice import CAPTURING
from service.jobs import queue, reads
from service.jobs.claim_order import jobs as job_table
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.submit import submit_sweep
from service.jobs.sweeps import get_sweep
from service.jobs.tables import Job, Sweep
from service.jobs.workers import list_workers
from tests.databases import EITHER, ONLY_SQLITE
from tests.faults.undisturbed import (
    DENSE,
    TEXT,
    assert_undisturbed,
    hooked,
    train_stacked,
    train_undisturbed,
)
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs
from tests.worker.workplace import QUICK, SHORT_LEASE, Workplace

RARE = replace(QUICK, record=0.5)
"""As in the product: the jobs of a cohort would keep the database busy otherwise, where a commit takes as long."""

PATIENT = replace(RARE, cancel_grace=30.0)
"""For tests in which every member stops when it is asked to, and none is killed because the machine is busy."""

SMALL: dict[str, Any] = DENSE | {"epochs": 8}


def submit(place: Workplace, n: int = 3) -> list[Job]:
    """Jobs of one shape, with the seeds 1 to n."""
    return [place.submit_member(seed=seed) for seed in range(1, n + 1)]


def submit_together(place: Workplace, configs: list[dict[str, Any]]) -> tuple[Sweep, list[Job]]:
    """A sweep of jobs of one shape."""
    shape: dict[str, Any] = {"cohort_key": "one", "total_steps": 100}
    new = [NewJob(text=TEXT, config=JobConfig(**config).model_dump(mode="json"), **shape) for config in configs]
    sweep, _ = submit_sweep(place.db, NewSweep(jobs=new, config=DENSE, parameters=[]))
    return sweep, [reads.get_job(place.db, job_id) for job_id in get_sweep(place.db, sweep.id)[2].job_ids]


def pid(place: Workplace, job: Job) -> int:
    file = place.folder(job) / f"pid.{place.job(job).fence}"
    return int(place.wait_until(lambda: file.exists() and file.read_text()))


def finish(place: Workplace, *jobs: Job) -> None:
    for job in jobs:
        place.folder(job).mkdir(parents=True, exist_ok=True)
        place.finish(job)
    for job in jobs:
        place.wait_for(job, "succeeded")


@EITHER
def test_jobs_that_are_trained_together_end_with_the_bytes_that_each_has_alone(place: Workplace) -> None:
    configs = [SMALL | {"seed": seed, "lr": lr} for seed, lr in ((1, 1e-3), (2, 3e-3), (3, 5e-3))]
    jobs = [place.submit_member(TEXT, **config) for config in configs]
    place.start_worker(program=hooked({}), cohort=8, timing=RARE)
    for job in jobs:
        place.wait_for(job, "succeeded", "failed")
    assert len({pid(place, job) for job in jobs}) == 1
    assert {(place.job(job).cohort_size, place.job(job).fence) for job in jobs} == {(3, 1)}
    for job, config in zip(jobs, configs, strict=True):
        assert_undisturbed(place, job, train_undisturbed(JobConfig(**config)))


@ONLY_SQLITE
def test_jobs_in_a_program_of_stacked_weights_end_with_its_bytes_though_the_trainer_died(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [SMALL | {"seed": seed, "dropout": dropout} for seed, dropout in ((1, 0.0), (2, 0.2), (3, 0.4))]
    jobs = [place.submit_member(TEXT, **config) for config in configs]
    place.start_worker(program=hooked({1: {"line": 12}}, "stacked"), cohort=8, timing=RARE)
    monkeypatch.setitem(CAPTURING, "cpu", RecordedGraphs)
    expected = train_stacked([JobConfig(**config) for config in configs])
    for job, undisturbed in zip(jobs, expected, strict=True):
        ended = place.wait_for(job, "succeeded", "failed")
        assert ended.execution is not None
        assert (ended.execution["path"], ended.execution["width"]) == ("stacked", 3)
        assert (ended.fence, ended.crashes, ended.cohort_id) == (2, 0, None)  # alone from then on
        assert_undisturbed(place, job, undisturbed)


@ONLY_SQLITE
def test_the_forks_of_a_trainer_that_was_killed_end_and_its_jobs_go_on_to_their_own_bytes(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [DENSE | {"seed": seed, "n_embd": 64} for seed in (1, 2, 3)]  # files that no pipe holds
    jobs = [place.submit_member(TEXT, **config) for config in configs]
    place.start_worker(program=hooked({1: {"wait": "f1-50/renamed", "forks": 2}}, "fused"), cohort=8, timing=RARE)
    place.wait_until(lambda: place.job(jobs[0]).fence == 1)
    trainer = psutil.Process(pid(place, jobs[0]))
    # One at least cannot end: nobody takes what its members have to say while a quarter waits to be written.
    forks = place.wait_until(trainer.children)
    trainer.kill()
    place.wait_until(lambda: not any(fork.is_running() for fork in forks))
    monkeypatch.setenv("NANOMOE_STEP_PATH", "fused")
    for job, config in zip(jobs, configs, strict=True):
        ended = place.wait_for(job, "succeeded", "failed")
        assert ended.execution is not None
        assert (ended.fence, ended.execution["path"], ended.execution["n_threads"]) == (2, "fused", 1)
        assert_undisturbed(place, job, train_undisturbed(JobConfig(**config)))


@EITHER
def test_a_member_is_cancelled_paused_and_resumed_while_the_others_go_on(place: Workplace) -> None:
    jobs = submit(place, 4)
    first, cancelled, paused, last = jobs
    place.start_worker("work", cohort=4, timing=PATIENT)
    for job in jobs:
        place.wait_for_step(job, 3)
    assert [job.id for job in list_workers(place.db)[0][1]] == [job.id for job in jobs]
    queue.request_cancel(place.db, cancelled.id)
    queue.request_pause(place.db, paused.id)
    place.wait_for(cancelled, "cancelled")
    place.wait_for(paused, "paused")
    step = place.job(paused).progress["step"]
    assert place.statuses(first) == place.statuses(last) == ["queued", "running"]
    queue.resume(place.db, paused.id)
    finish(place, first, last)
    resumed = place.wait_for(paused, "running")
    assert (resumed.fence, resumed.cohort_id) == (2, None)
    finish(place, paused)
    assert len({pid(place, job) for job in (first, paused, last)}) == 1
    assert {"code": "resumed", "message": f"attempt 2 goes on from step {step}"} in place.events(paused, "warning")
    assert [place.job(job).crashes for job in jobs] == [0, 0, 0, 0]


@ONLY_SQLITE
def test_a_member_that_failed_leaves_the_others_their_trainer(place: Workplace) -> None:
    jobs = submit(place)
    place.start_worker("fail_second", cohort=3, timing=RARE)
    place.wait_for(jobs[1], "failed")
    assert [place.job(job).status for job in jobs] == ["running", "failed", "running"]
    finish(place, jobs[0], jobs[2])
    (following,) = submit(place, 1)
    finish(place, following)
    assert pid(place, following) != pid(place, jobs[0])


@ONLY_SQLITE
def test_a_lost_lease_drops_one_member_alone(place: Workplace) -> None:
    jobs = submit(place)
    place.start_worker("work", cohort=3, timing=RARE)
    for job in jobs:
        place.wait_for_step(job, 3)
    with place.db.write() as session:  # as if another worker had claimed it
        lost = sa.update(job_table).where(job_table.c.id == jobs[1].id)
        session.execute(lost.values(fence=2, worker_id="another", lease_seconds=60.0))
    step = place.job(jobs[1]).progress["step"]
    finish(place, jobs[0], jobs[2])
    assert place.job(jobs[1]).progress["step"] == step
    assert [place.job(job).fence for job in jobs] == [1, 2, 1]


@ONLY_SQLITE
def test_when_the_trainer_dies_each_member_counts_a_crash_and_the_poisonous_one_is_found(place: Workplace) -> None:
    jobs = submit(place)
    place.start_worker("die_with_third", cohort=3, timing=RARE)
    finish(place, *jobs[:2])
    failed = place.wait_for(jobs[2], "failed")
    assert failed.error is not None
    assert failed.error["code"] == "crashed_repeatedly"
    for job in jobs[:2]:
        again = place.job(job)
        assert (again.fence, again.cohort_id, again.cohort_key) == (2, None, None)
        assert {"code": "resumed", "message": "attempt 2 goes on from step 5"} in place.events(job, "warning")


@ONLY_SQLITE
def test_a_member_that_does_not_stop_costs_the_others_no_crash(place: Workplace) -> None:
    jobs = submit(place)
    place.start_worker("never_stop_second", cohort=3, timing=RARE)
    for job in jobs:
        place.wait_for_step(job, 3)
    queue.request_cancel(place.db, jobs[1].id)
    place.wait_for(jobs[1], "cancelled")
    for job in (jobs[0], jobs[2]):
        place.wait_until(lambda job=job: place.job(job).fence == 2)  # type: ignore[misc]
    finish(place, jobs[0], jobs[2])
    assert [place.job(job).crashes for job in jobs] == [0, 0, 0]
    assert place.job(jobs[0]).cohort_size == 2


@ONLY_SQLITE
def test_out_of_memory_halves_the_cohort_before_any_micro_batch(place: Workplace) -> None:
    jobs = submit(place, 4)
    for job in jobs:
        place.folder(job).mkdir(parents=True)
        place.finish(job)
    place.start_worker("out_of_memory_in_company", cohort=4, timing=RARE)
    for job in jobs:
        ended = place.wait_for(job, "succeeded", "failed")
        assert (ended.status, ended.fence, ended.crashes, ended.cohort_size) == ("succeeded", 2, 0, 2)
        assert ended.execution is not None
        assert ended.execution["micro_batch"] == ended.config["batch_size"]
        reasons = [data["status_reason"] for data in place.events(job, "status")]
        assert "memory ran out for 4 jobs at once, goes on among at most 2" in reasons


@ONLY_SQLITE
def test_a_worker_that_drains_returns_every_member_with_a_snapshot(place: Workplace) -> None:
    jobs = submit(place)
    worker = place.start_worker("work_long", cohort=3, timing=RARE)
    for job in jobs:
        place.wait_for_step(job, 3)
    worker.signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    steps = [place.job(job).progress["step"] for job in jobs]
    assert [(place.job(job).status, place.job(job).crashes) for job in jobs] == [("queued", 0)] * 3
    place.start_worker("work_long", cohort=3, timing=RARE)
    finish(place, *jobs)
    assert {(place.job(job).fence, place.job(job).cohort_size) for job in jobs} == {(2, 3)}
    for job, step in zip(jobs, steps, strict=True):
        assert {"code": "resumed", "message": f"attempt 2 goes on from step {step}"} in place.events(job, "warning")


@ONLY_SQLITE
def test_members_of_a_worker_that_was_killed_are_trained_together_again(place: Workplace) -> None:
    jobs = submit(place)
    worker = place.start_worker("work_long", cohort=3, timing=replace(SHORT_LEASE, record=0.5))
    for job in jobs:
        place.wait_for_step(job, 3)
    worker.signal(signal.SIGKILL)
    worker.wait(60)
    for job in jobs:  # one rescue finds all of them
        place.wait_until(lambda job=job: place.db.time() > place.job(job).lease_until)  # type: ignore[misc]
    place.start_worker("work_long", cohort=3, timing=replace(SHORT_LEASE, record=0.5, rescue=0.2))
    for job in jobs:
        place.wait_until(lambda job=job: place.job(job).fence >= 2)  # type: ignore[misc]
    finish(place, *jobs)
    assert {place.job(job).cohort_size for job in jobs} == {3}


def written(batches: Path, name: str) -> list[int]:
    """Of how many jobs each transaction of this kind was about."""
    lines = [line.split() for line in batches.read_text().splitlines()]
    return [int(n) for kind, n in lines if kind == name]


@EITHER
def test_64_members_take_few_transactions_and_no_thread_each(place: Workplace, tmp_path: Path) -> None:
    jobs = submit(place, 64)
    batches, worker_log = tmp_path / "batches", tmp_path / "log"
    timing = replace(RARE, lease=120.0, heartbeat=1.0)  # as many times its heartbeat as a busy machine may need
    worker = place.start_worker("work_fast", cohort=64, batches=batches, timing=timing, log=worker_log)
    for job in jobs:
        place.wait_for_step(job, 75)
    assert psutil.Process(worker.pid).num_threads() < 16
    finish(place, *jobs)
    reports, ends = written(batches, "record_reports"), written(batches, "finish_jobs")
    assert sum(reports) > 5 * len(reports), reports
    assert sum(ends) == 64
    assert len(ends) < 32, ends
    assert "lease_deadline_passed" not in worker_log.read_text()


@ONLY_SQLITE
def test_a_sweep_is_paused_resumed_and_cancelled_as_one(place: Workplace, tmp_path: Path) -> None:
    sweep, jobs = submit_together(place, [DENSE | {"seed": seed} for seed in range(16)])
    batches, worker_log = tmp_path / "batches", tmp_path / "log"
    place.start_worker("work", cohort=16, batches=batches, timing=PATIENT, log=worker_log)
    for job in jobs:
        place.wait_for_step(job, 100)  # so that all have equally much to do
    queue.request_pause_sweep(place.db, sweep.id)
    for job in jobs:
        place.wait_for(job, "paused")
        snapshot = reads.find_snapshot(place.db, job.id)
        assert snapshot is not None
        assert snapshot.step == place.job(job).progress["step"]
    queue.resume_sweep(place.db, sweep.id)
    for job in jobs:
        again = place.wait_for(job, "running")
        assert (again.fence, again.cohort_size) == (2, 16)
        place.wait_until(lambda job=job: place.events(job, "warning"))  # type: ignore[misc]
    queue.request_cancel_sweep(place.db, sweep.id)
    for job in jobs:
        place.wait_for(job, "cancelled")
    releases = written(batches, "release_jobs")
    assert sum(releases) == 32
    assert len(releases) < 32, releases
    assert "trainer_killed" not in worker_log.read_text()
    (following,) = submit(place, 1)
    finish(place, following)
    assert {pid(place, job) for job in (following, *jobs)} == {pid(place, jobs[0])}


@EITHER
def test_a_paused_sweep_goes_on_and_ends_with_its_own_bytes(place: Workplace, tmp_path: Path) -> None:
    configs = [SMALL | {"seed": seed, "lr": lr} for seed, lr in ((1, 1e-3), (2, 3e-3), (3, 5e-3), (4, 4e-3))]
    sweep, jobs = submit_together(place, configs)
    batches, worker_log = tmp_path / "batches", tmp_path / "log"
    waits = hooked({1: {"hold": "f1-25/renamed", "step by step": True}})  # until the first of them is asked to stop
    place.start_worker(program=waits, cohort=4, batches=batches, timing=PATIENT, log=worker_log)
    for job in jobs:
        place.wait_for_step(job, 1)
    queue.request_pause_sweep(place.db, sweep.id)
    for job in jobs:
        place.wait_for(job, "paused", "succeeded", "failed")
        snapshot = reads.find_snapshot(place.db, job.id)
        assert snapshot is not None
        assert snapshot.step == place.job(job).progress["step"]
    assert "trainer_killed" not in worker_log.read_text()
    queue.resume_sweep(place.db, sweep.id)
    for job, config in zip(jobs, configs, strict=True):
        resumed = place.wait_for(job, "succeeded", "failed")
        assert (resumed.fence, resumed.crashes) == (2, 0)
        assert_undisturbed(place, job, train_undisturbed(JobConfig(**config)))
    assert len({pid(place, job) for job in jobs}) == 1


@ONLY_SQLITE
@pytest.mark.parametrize(
    ("width", "sizes"), [(1, [None] * 3), (2, [2, 2, None]), ("auto", [3, 3, 3])], ids=["1", "2", "auto"]
)
def test_the_setting_says_how_many_are_trained_together(
    place: Workplace, tmp_path: Path, width: Any, sizes: list[int | None]
) -> None:
    jobs = submit(place, 3)
    place.start_worker("succeed", cohort=width, timing=RARE, log=tmp_path / "log")
    for job in jobs:
        place.wait_for(job, "succeeded")
    assert [place.job(job).cohort_size for job in jobs] == sizes
    reason = "as measured on this machine" if width == "auto" else "as set"
    assert reason in (tmp_path / "log").read_text()
