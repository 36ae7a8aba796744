"""A job that was killed, however often and wherever, ends with exactly the bytes of one that was not."""

import hashlib
import json
import random
import signal
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from nanomoe.store import commit
from service.database.opening import open_database
from service.jobs import queue, reads
from service.jobs.tables import Job
from tests.databases import ONLY_SQLITE
from tests.faults import toy_trainer
from tests.faults.toy_trainer import QUARTERS, Toy
from tests.faults.undisturbed import (
    CONFIGS,
    DENSE,
    TEXT,
    Undisturbed,
    assert_undisturbed,
    hooked,
    train_undisturbed,
    undisturbed,
)
from tests.worker.workplace import SHORT_LEASE, Workplace


@ONLY_SQLITE
@pytest.mark.parametrize("name", CONFIGS)
def test_a_job_killed_at_random_points_ends_with_the_bytes_of_an_undisturbed_one(place: Workplace, name: str) -> None:
    chance = random.Random(20261122)  # noqa: S311 - the points are the same every time
    hooks = {attempt: {"line": chance.randint(1, 12)} for attempt in range(1, 4)}
    # New interpreters, each with hash seeds of its own, for one of them.
    place.start_worker(program=hooked(hooks), max_crashes=100, snapshot_seconds=0.05, fresh=name == "dense")
    job = place.submit(TEXT, **CONFIGS[name])
    done = place.wait_for(job, "succeeded", "failed", timeout=200)
    assert (done.status, done.attempt) == ("succeeded", 4)
    assert_undisturbed(place, job, undisturbed(name))


def announced(names: Iterable[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The points that the commit of a folder with these files goes through."""
    points: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(commit, "reached", points.append)
        checkpoint.write(folder, dict.fromkeys(names, b""))
    return points


def undisturbed_toy() -> Undisturbed:
    """What the toy trainer leaves where nobody disturbs it."""
    toy, found = Toy(), Undisturbed({}, {}, [])
    for step, percent in QUARTERS.items():
        while toy.step < step:
            loss = toy.learn()
            found.steps.append((toy.step, loss, 0.5, 1.0))
        files = toy.files(toy_trainer.CHECKPOINT)
        found.files[percent] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        found.metrics[percent] = toy.metrics.to_row()
    return found


@ONLY_SQLITE
@pytest.mark.parametrize(
    ("folder", "names"), [("50", toy_trainer.CHECKPOINT), ("s4", toy_trainer.SNAPSHOT)], ids=["checkpoint", "snapshot"]
)
def test_death_at_every_point_of_a_commit_loses_nothing(
    place: Workplace, folder: str, names: frozenset[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half-way there is a snapshot to go on from; every attempt does, and comes one point further than the last.
    points = announced(names, tmp_path / "announced", monkeypatch)
    deaths = {fence: f"f{fence}-{folder}/{point}" for fence, point in enumerate(points, 1)}
    program = [toy_trainer.__file__, json.dumps(deaths)]
    place.start_worker(program=program, max_crashes=100, backoff_seconds=0.001)
    job = place.submit()
    done = place.wait_for(job, "succeeded", "failed", timeout=200)
    assert (done.status, done.attempt) == ("succeeded", len(points) + 1)
    assert resumed_at(place, job) == [2] * len(points)
    assert_undisturbed(place, job, undisturbed_toy())


@ONLY_SQLITE
def test_a_real_training_that_dies_late_in_a_commit_loses_nothing(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed("dense")
    assert set(expected.files[50]) == toy_trainer.CHECKPOINT, "the test above commits other files than a training does"
    # A folder that is written in part, whole, and named: what else there is, the test above sees.
    points = announced(toy_trainer.CHECKPOINT, tmp_path / "announced", monkeypatch)[-3:]
    half = len(expected.steps) // 2
    deaths = [f"{folder}/{point}" for folder in ("50", f"s{half}") for point in points]
    hooks = {fence: {"point": f"f{fence}-{death}"} for fence, death in enumerate(deaths, 1)}
    place.start_worker(program=hooked(hooks), max_crashes=100, backoff_seconds=0.001, snapshot_seconds=1e-6)
    job = place.submit(TEXT, **DENSE)
    done = place.wait_for(job, "succeeded", "failed", timeout=250)
    assert (done.status, done.attempt) == ("succeeded", len(deaths) + 1)
    assert 0 not in (steps := resumed_at(place, job))
    assert len(steps) == len(deaths)
    assert_undisturbed(place, job, expected)


def resumed_at(place: Workplace, job: Job) -> list[int]:
    """The step that each attempt but the first went on from."""
    told = [event["message"] for event in place.events(job, "warning") if event["code"] == "resumed"]
    return [int(message.rpartition(" ")[2]) for message in told]


@ONLY_SQLITE
@pytest.mark.parametrize(("write", "number"), [("checkpoint_report", 3), ("snapshot_report", 2)])
def test_the_death_of_a_supervisor_between_files_and_row_loses_nothing(
    place: Workplace, write: str, number: int
) -> None:
    worker = place.start_worker(program=hooked({}), timing=SHORT_LEASE, snapshot_seconds=1e-6, dies_at=(write, number))
    job = place.submit(TEXT, **DENSE)
    assert worker.wait(100) == -signal.SIGKILL
    place.start_worker(program=hooked({}))
    assert place.wait_for(job, "succeeded", "failed", timeout=100).attempt == 2
    assert 0 not in resumed_at(place, job)
    assert_undisturbed(place, job, undisturbed("dense"))


@ONLY_SQLITE
def test_a_row_recorded_before_its_files_would_refer_to_missing_files(place: Workplace) -> None:
    place.start_worker(program=hooked({1: {"reported first": "f1-25"}}), backoff_seconds=600)
    job = place.submit(TEXT, **DENSE)
    place.wait_until(lambda: place.job(job).crashes)
    row = reads.get_checkpoint(place.db, job.id, 25)
    with pytest.raises(checkpoint.CheckpointDamaged):
        checkpoint.verify(place.settings.data_dir / row.folder, row.manifest_sha256)


@ONLY_SQLITE
def test_a_paused_job_ends_with_the_same_bytes(place: Workplace) -> None:
    # The commit of the first quarter waits for the request, and training waits for the commit.
    place.start_worker(program=hooked({1: {"hold": "f1-25/renamed"}}))
    job = place.submit(TEXT, **DENSE)
    place.wait_until(lambda: reads.list_checkpoints(place.db, job.id))
    queue.request_pause(place.db, job.id)
    place.wait_for(job, "paused")
    assert reads.find_snapshot(place.db, job.id) is not None
    queue.resume(place.db, job.id)
    assert place.wait_for(job, "succeeded").attempt == 2
    assert_undisturbed(place, job, undisturbed("dense"))


def test_a_job_goes_on_where_its_data_folder_was_moved_to(place: Workplace, tmp_path: Path) -> None:
    worker = place.start_worker(program=hooked({1: {"hold": "f1-25/renamed"}}))
    job = place.submit(TEXT, **DENSE)
    place.wait_until(lambda: reads.list_checkpoints(place.db, job.id))
    worker.signal(signal.SIGTERM)  # drained: the job waits for any worker
    assert worker.wait(60) == 0
    before = place.settings.data_dir
    moved = before.rename(tmp_path / "elsewhere")
    url = place.settings.database_url.replace(str(before), str(moved))
    settings = place.settings.model_copy(update={"data_dir": moved, "database_url": url})
    with closing(open_database(settings)) as db:
        other = Workplace(db, settings)
        try:
            other.start_worker(program=hooked({}))
            assert other.wait_for(job, "succeeded", "failed").attempt == 2
            assert 0 not in resumed_at(other, job)
            assert_undisturbed(other, job, undisturbed("dense"))
        finally:
            other.end()


@ONLY_SQLITE
@pytest.mark.parametrize(
    "hooks",
    [{1: {"line": 3, "out of memory": True}}, {1: {"fits": 3, "line": 7}, 2: {"fits": 3}}],
    ids=["killed", "refused by torch and then killed"],
)
def test_a_job_whose_micro_batch_was_halved_trains_on_the_same_windows(
    place: Workplace, hooks: dict[int, dict[str, Any]]
) -> None:
    place.start_worker(program=hooked(hooks))
    job = place.submit(TEXT, **DENSE | {"batch_size": 4})
    done = place.wait_for(job, "succeeded", "failed", timeout=100)
    assert (done.status, done.attempt, done.execution["micro_batch"]) == ("succeeded", 2, 2)
    expected = train_undisturbed(JobConfig(**DENSE | {"batch_size": 2, "gradient_accumulation_steps": 2}))
    weights = {
        row.percent: {file["name"]: file["sha256"] for file in row.files}[checkpoint.WEIGHTS]
        for row in reads.list_checkpoints(place.db, job.id)
    }
    assert weights == {percent: files[checkpoint.WEIGHTS] for percent, files in expected.files.items()}
    assert [tuple(row) for row in reads.steps_after(place.db, job.id, 0, 100_000)] == expected.steps
    codes = [event["code"] for event in place.events(job, "warning")]
    assert (codes.count("micro_batch_halved"), codes.count("resume_not_exact")) == (1, 1)
