"""One trainer, many jobs: what is the same as in a new process, and what ends a trainer instead."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanomoe.config import JobConfig
from service.jobs import queue
from service.jobs.tables import Job
from tests.databases import EITHER, ONLY_SQLITE
from tests.faults.undisturbed import DENSE, MOE, TEXT, assert_undisturbed, hooked, train_undisturbed
from tests.worker.workplace import HERE, QUICK, Workplace, ended_within, is_alive
from worker.lock import SlotLock
from worker.process import Received, TrainerProcess
from worker.process_state import ProcessState
from worker.protocol import CheckpointWritten, Idle, Ready, Start


def trainers(place: Workplace, *jobs: Job) -> list[psutil.Process]:
    return [place.trainer(job) for job in jobs]


@EITHER
def test_a_trainer_trains_one_job_after_another(place: Workplace) -> None:
    jobs = [place.submit() for _ in range(3)]
    place.start_worker("succeed")
    for job in jobs:
        place.wait_for(job, "succeeded")
    assert len({trainer.pid for trainer in trainers(place, *jobs)}) == 1
    assert [place.job(job).fence for job in jobs] == [1, 1, 1]  # a fence alone does not tell them apart


@ONLY_SQLITE
def test_a_job_that_failed_takes_its_trainer_with_it(place: Workplace) -> None:
    jobs = [place.submit() for _ in range(2)]
    place.start_worker("fail")
    for job in jobs:
        place.wait_for(job, "failed")
    first, second = (int((place.folder(job) / "pid.1").read_text()) for job in jobs)
    assert first != second
    assert not is_alive(first)


def run_two_jobs_of_which_the_first_leaves_a_child(place: Workplace, *without: str) -> tuple[Job, Job, int]:
    """Both jobs, and the child's process id, which is nobody's any more where the child has been reaped."""
    first = place.submit()
    place.start_worker("leave_a_child", without=without)
    place.wait_for(first, "succeeded")
    (child,) = map(int, (place.folder(first) / "children").read_text().split())
    return first, place.submit(), child


@ONLY_SQLITE
def test_what_a_job_started_is_dead_before_the_job_has_ended(place: Workplace) -> None:
    first, second, child = run_two_jobs_of_which_the_first_leaves_a_child(place)
    assert not is_alive(child)
    place.wait_for(second, "succeeded")
    assert place.trainer(second).pid != int((place.folder(first) / "pid.1").read_text())


@ONLY_SQLITE
def test_a_child_that_nobody_found_keeps_the_slot_locked(place: Workplace) -> None:
    _, second, child = run_two_jobs_of_which_the_first_leaves_a_child(place, "the search for survivors")
    with pytest.raises(AssertionError, match="in vain"):
        place.wait_for(second, "running", "succeeded", timeout=10 * QUICK.retry)
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)
    place.wait_for(second, "succeeded")


@ONLY_SQLITE
def test_without_both_proofs_a_job_would_share_its_device_with_what_another_left(place: Workplace) -> None:
    _, second, child = run_two_jobs_of_which_the_first_leaves_a_child(
        place, "the search for survivors", "the slot's lock"
    )
    place.wait_for(second, "succeeded")
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


@ONLY_SQLITE
@pytest.mark.parametrize(
    ("script", "reason"),
    [("confuse_jobs", "violated the protocol"), ("idle_too_soon", "did not report how its job ended")],
)
def test_a_trainer_that_mixes_up_its_jobs_has_crashed(place: Workplace, script: str, reason: str) -> None:
    job = place.submit()
    place.start_worker(script, backoff_seconds=600)
    crashed = place.wait_until(lambda: place.job(job).crashes and place.job(job))
    assert reason in (crashed.status_reason or "")
    assert not is_alive(_pid(place, job))
    assert place.recorded_steps(job) == []


def _pid(place: Workplace, job: Job) -> int:
    return int((place.folder(job) / "pid.1").read_text())


@ONLY_SQLITE
def test_a_signal_from_outside_ends_an_idle_trainer_and_no_job_suffers(place: Workplace) -> None:
    first = place.submit()
    place.start_worker("succeed")
    place.wait_for(first, "succeeded")
    idle = place.trainer(first)
    idle.send_signal(signal.SIGTERM)
    assert ended_within(20, idle)
    second = place.submit()
    done = place.wait_for(second, "succeeded")
    assert done.crashes == 0
    # Of its last attempt: the first may have been sent to a trainer that was about to end.
    assert place.trainer(second, done.fence).pid != idle.pid


@ONLY_SQLITE
def test_a_stop_that_came_too_late_for_one_job_does_not_stop_the_next(place: Workplace) -> None:
    first = place.submit()
    place.start_worker("work")
    place.wait_for_step(first, 3)
    queue.request_pause(place.db, first.id)
    place.wait_for(first, "paused")
    second = place.submit()
    place.wait_for_step(second, 20)
    assert place.trainer(second) == place.trainer(first)


@ONLY_SQLITE
@pytest.mark.parametrize("percent", [0, 50])
def test_a_cancel_during_an_evaluation_ends_the_job_and_not_its_trainer(place: Workplace, percent: int) -> None:
    """Percent 0 is evaluated in a thread beside the first steps, the others between two steps."""
    job = place.submit(TEXT, **DENSE)
    place.start_worker(program=hooked({1: {"evaluates": percent}}), timing=replace(QUICK, cancel_grace=20.0))
    place.wait_until((place.folder(job) / "evaluating").exists)
    queue.request_cancel(place.db, job.id)
    place.wait_for(job, "cancelled")
    following = place.submit()
    place.wait_until((place.folder(following) / "pid.1").exists)
    assert _pid(place, following) == _pid(place, job)


@ONLY_SQLITE
def test_a_job_that_was_paused_during_an_evaluation_ends_as_an_undisturbed_one(place: Workplace) -> None:
    expected = train_undisturbed(JobConfig(**SMALL))
    job = place.submit(TEXT, **SMALL)
    place.start_worker(program=hooked({1: {"evaluates": 50}}), timing=replace(QUICK, stop_grace=20.0))
    place.wait_until((place.folder(job) / "evaluating").exists)
    queue.request_pause(place.db, job.id)
    place.wait_for(job, "paused")
    queue.resume(place.db, job.id)
    place.wait_for(job, "succeeded")
    assert place.job(job).crashes == 0
    assert_undisturbed(place, job, expected)


SMALL: dict[str, Any] = DENSE | {"epochs": 8}
OTHER: dict[str, Any] = MOE | {"epochs": 4, "deterministic": True, "precision": "bfloat16"}
FAILS: dict[str, Any] = SMALL | {"tokenizer": "no-such"}
CRAMPED: dict[str, Any] = SMALL | {"batch_size": 4 * SMALL["batch_size"]}


@ONLY_SQLITE
@pytest.mark.parametrize("path", ["eager", "fused"])
def test_a_job_s_bytes_are_the_same_whether_it_is_a_trainer_s_first_or_a_later_one(
    place: Workplace, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOMOE_STEP_PATH", path)
    expected, other = train_undisturbed(JobConfig(**SMALL)), train_undisturbed(JobConfig(**OTHER))
    first, between, cramped, last = (place.submit(TEXT, **job) for job in (SMALL, OTHER, CRAMPED, SMALL))
    failing, cancelled, again = place.submit(TEXT, **FAILS), place.submit(TEXT, **SMALL), place.submit(TEXT, **SMALL)
    queue.request_cancel(place.db, cancelled.id)
    place.start_worker(program=hooked({1: {"fits": SMALL["batch_size"]}}, path))
    for job in (first, between, cramped, last, again):
        place.wait_for(job, "succeeded", "failed")
    assert place.job(failing).error is not None
    assert "micro_batch_halved" in [warning["code"] for warning in place.events(cramped, "warning")]
    assert len({_pid(place, job) for job in (first, between, cramped, last, failing)}) == 1
    assert _pid(place, again) != _pid(place, failing)
    for job in (first, last, again):
        assert_undisturbed(place, job, expected)
        assert (place.job(job).execution or {})["path"] == path
    assert_undisturbed(place, between, other)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_trainer_holds_no_more_memory_after_its_twentieth_job_than_after_its_fifth(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    until = time.monotonic() + 300
    options = ["--parent", str(os.getpid()), "--until", str(until)]
    trainer = TrainerProcess([sys.executable, *hooked({}, "fused"), *options], environment, until=until)
    quick = {"epochs": 1, "cont_max_new_tokens": 0}
    shapes = [JobConfig(**SMALL | quick), JobConfig(**SMALL | quick | {"n_embd": 48, "block_size": 64})]
    resident, manifests = [], []
    try:
        assert isinstance(_next_of(trainer, Ready), Ready)
        for n in range(20):
            manifests.append(_train(trainer, shapes[n % 2], n, tmp_path))
            resident.append(psutil.Process(trainer.pid).memory_info().rss)
    finally:
        trainer.kill_and_reap(10)
    # 0.2 MiB; 2 MiB where each new thread has an arena of its own (measured).
    assert max(resident[4:]) < resident[4] + 2**20
    assert manifests == manifests[:2] * 10  # and each job of a shape has left the same bytes


def _train(trainer: TrainerProcess, config: JobConfig, n: int, folder: Path) -> str:
    """Have a trainer train a job; the SHA-256 of its last checkpoint's manifest."""
    lock = SlotLock(folder / "lock", trainer.token)
    assert lock.acquire()
    job_folder = folder / str(n)
    job_folder.mkdir()
    start = Start(
        job_id=f"{n:032x}", fence=1, config=config, text_path=str(folder / "text.txt"), folder=str(job_folder),
        execution=None, resume=None, parent=None, device="cpu", snapshot_seconds=60.0, allow_hub=False,
        tokenizer_dir=None,
    )  # fmt: skip
    trainer.train([start], lock)
    last = ""
    while not isinstance(message := _next_of(trainer, CheckpointWritten, Idle), Idle):
        last = message.manifest_sha256
    return last


def _next_of(trainer: TrainerProcess, *kinds: type[Any]) -> Any:
    """The next message of one of these kinds."""
    while True:
        received = trainer.inbox.get(timeout=60)
        assert isinstance(received, Received)
        if isinstance(received.message, kinds):
            return received.message


def test_a_thread_that_still_runs_is_left() -> None:
    state, end = ProcessState(), threading.Event()
    thread = threading.Thread(target=end.wait, name="evaluation")
    thread.start()
    assert state.what_is_left() == "the thread evaluation still runs"
    end.set()
    assert state.what_is_left() is None


def test_memory_that_is_not_given_back_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ProcessState()
    assert state.what_is_left() is None
    held = bytearray(os.urandom(2**20) * 64)
    monkeypatch.setattr("worker.process_state.MOST_GROWN_BYTES", 32 * 2**20)
    assert "bytes more than when it was new" in (state.what_is_left() or "")
    del held
    assert state.what_is_left() is None


@pytest.mark.parametrize(("kept_bytes", "is_forgotten"), [(100 * 2**20, False), (300 * 2**20, True)])
def test_steps_that_are_kept_on_a_gpu_are_forgotten_where_they_hold_too_much(
    kept_bytes: int, is_forgotten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    kept = [kept_bytes]
    state = ProcessState(forget_steps=kept.clear)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for held in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, held, lambda: sum(kept))
    assert state.what_is_left() is None
    assert (kept == []) == is_forgotten


def test_every_setting_of_the_process_is_put_back() -> None:
    import torch

    state = ProcessState()
    n_threads, drawn = torch.get_num_threads(), []
    for _ in range(2):
        state.restore()
        drawn.append(torch.rand(1).item())
        assert torch.get_num_threads() == n_threads
        assert torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
        assert "NANOMOE_LEFT_BY_A_JOB" not in os.environ
        torch.set_num_threads(n_threads + 1)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        os.environ["NANOMOE_LEFT_BY_A_JOB"] = "1"
    state.restore()
    assert drawn[0] == drawn[1]
