"""What has no row: found whoever left it, swept after a day, and nothing else touched."""

import os
import time
from pathlib import Path

import pytest

from nanomoe import checkpoint
from nanomoe.store.local import LocalStore
from service.database.database import Database
from service.jobs import queue, recording
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity
from service.settings import Settings
from service.storage.job_folders import checkpoint_folder, job_folder
from service.storage.orphans import find_orphans, sweep_orphans, sweep_scratch
from tests.databases import ONLY_SQLITE
from tests.service.recorded_files import snapshot_folder

DAY = 86_400


@pytest.fixture
def data(settings: Settings) -> Path:
    return settings.data_dir


def claimed(db: Database) -> Claim:
    submit_job(db, NewJob(text="a b", config={}))
    claim = queue.claim(db, WorkerIdentity(), 60)
    assert claim is not None
    return claim


def write(data: Path, folder: str) -> str:
    """A folder as the trainer writes it, a day and a minute old; returns its manifest's sha256."""
    _, sha256 = checkpoint.write(data / folder, {"config.json": b"{}\n"})
    age(data / folder)
    return sha256


def age(path: Path, seconds: float = DAY + 60) -> None:
    then = time.time() - seconds
    for entry in (*path.rglob("*"), path):
        os.utime(entry, (then, then))


def record(db: Database, data: Path, claim: Claim, percent: int) -> str:
    folder = checkpoint_folder(claim.job_id, claim.fence, percent)
    sha256 = write(data, folder)
    recording.record_checkpoint(
        db, claim, percent=percent, step=percent, epoch=percent, folder=folder, manifest_sha256=sha256,
        files=[], metrics={},
    )  # fmt: skip
    return folder


def test_only_what_has_no_row_and_no_living_claim_is_swept(db: Database, data: Path) -> None:
    claim = claimed(db)
    kept = record(db, data, claim, 0)
    snapshot = snapshot_folder(claim.job_id, claim.fence, 7)
    recording.record_snapshot(db, claim, step=7, folder=snapshot, manifest_sha256=write(data, snapshot))
    left = [f"jobs/{claim.job_id}/f1-25", f"jobs/{claim.job_id}/f1-25.tmp", f"jobs/{claim.job_id}/f1-s9"]
    for folder in left:
        write(data, folder)
    unfinished_text = f"jobs/{claim.job_id}/text.f1.tmp"
    (data / unfinished_text).write_text("half")
    age(data / unfinished_text)
    (data / "jobs" / claim.job_id / "text.txt").write_text("a b")
    age(data / "jobs" / claim.job_id)

    assert find_orphans(db, LocalStore(data)) == []  # all of it may be the running claim's

    queue.release(db, claim)
    again = queue.claim(db, WorkerIdentity(), 60)
    assert again is not None
    write(data, f"jobs/{claim.job_id}/f2-25.tmp")
    age(data / "jobs" / claim.job_id)
    assert sweep_orphans(db, LocalStore(data)) == sorted([*left, unfinished_text])
    there = {str(path.relative_to(data)) for path in (data / "jobs" / claim.job_id).iterdir()}
    assert there == {kept, snapshot, f"jobs/{claim.job_id}/f2-25.tmp", f"jobs/{claim.job_id}/text.txt"}


def test_all_files_of_a_deleted_job_are_swept_and_nothing_else(db: Database, data: Path, tmp_path: Path) -> None:
    claim = claimed(db)
    record(db, data, claim, 100)
    queue.finish(db, claim, "succeeded")
    queue.delete(db, claim.job_id)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("keep")
    for name in ("jobs/notes", "jobs/0123", "locks"):
        (data / name).mkdir()
    (data / "jobs" / ("a" * 32)).symlink_to(elsewhere)
    inside = record_free_folder(db, data)
    (data / inside / "f1-50").symlink_to(elsewhere)
    for folder in (data / "jobs", data / "locks"):
        age(folder)

    assert sweep_orphans(db, LocalStore(data)) == [f"jobs/{claim.job_id}"]
    assert (elsewhere / "mine").read_text() == "keep"
    assert sorted(path.name for path in (data / "jobs").iterdir()) == sorted(
        ["0123", "a" * 32, Path(inside).name, "notes"]
    )
    assert (data / inside / "f1-50").is_symlink()


def record_free_folder(db: Database, data: Path) -> str:
    """The folder of a job that waits, and has no files yet."""
    job, _ = submit_job(db, NewJob(text="c d", config={}))
    (data / job_folder(job.id)).mkdir(parents=True)
    return job_folder(job.id)


@ONLY_SQLITE
def test_beside_a_bucket_what_a_host_made_to_train_is_swept_and_no_checkpoint(db: Database, data: Path) -> None:
    running, ended, deleted = claimed(db), claimed(db), claimed(db)
    kept = record(db, data, ended, 0)
    queue.finish(db, ended, "succeeded")
    queue.finish(db, deleted, "succeeded")
    queue.delete(db, deleted.job_id)
    for claim in (running, ended, deleted):
        (data / job_folder(claim.job_id)).mkdir(parents=True, exist_ok=True)
        (data / job_folder(claim.job_id) / "text.txt").write_text("a b")
        (data / job_folder(claim.job_id) / "text.f1.tmp").write_text("a")
    (data / job_folder(deleted.job_id) / "files.tmp" / "files").mkdir(parents=True)
    (data / job_folder(deleted.job_id) / "files.tmp" / "files" / "ckpt.pt").write_text("a")
    assert sweep_scratch(db, LocalStore(data)) == []
    age(data / "jobs")
    texts = [f"{job_folder(claim.job_id)}/text.{kind}" for claim in (ended, deleted) for kind in ("f1.tmp", "txt")]
    assert sweep_scratch(db, LocalStore(data)) == sorted([*texts, f"{job_folder(deleted.job_id)}/files.tmp"])
    left = sorted(str(path.relative_to(data / "jobs")) for path in (data / "jobs").rglob("*") if path.is_file())
    assert left == sorted(
        [f"{running.job_id}/text.f1.tmp", f"{running.job_id}/text.txt"]
        + [f"{kept.removeprefix('jobs/')}/{name}" for name in ("config.json", "manifest.json")]
    )
    assert not (data / job_folder(deleted.job_id)).exists()


@ONLY_SQLITE
def test_what_is_younger_than_a_day_stays(db: Database, data: Path) -> None:
    claim = claimed(db)
    old, new = f"jobs/{'b' * 32}", f"jobs/{'c' * 32}"
    for folder in (old, new):
        write(data, f"{folder}/f1-0")
        age(data / folder)
    (data / new / "f1-0" / "config.json").write_text("written a moment ago")
    queue.release(db, claim)
    assert find_orphans(db, LocalStore(data)) == [old, new]
    assert sweep_orphans(db, LocalStore(data)) == [old]
    assert find_orphans(db, LocalStore(data)) == [new]


@ONLY_SQLITE
def test_a_row_that_is_written_while_we_look_saves_its_folder(
    db: Database, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The commit falls between the look at the disk and the look at the rows: the order of the two is what counts.
    claim = claimed(db)
    folder = checkpoint_folder(claim.job_id, claim.fence, 50)
    sha256 = write(data, folder)
    age(data / job_folder(claim.job_id))
    read = db.read

    def commit_then_read() -> object:
        monkeypatch.setattr(db, "read", read)
        recording.record_checkpoint(
            db, claim, percent=50, step=1, epoch=1, folder=folder, manifest_sha256=sha256, files=[], metrics={}
        )
        queue.finish(db, claim, "succeeded")
        return read()

    monkeypatch.setattr(db, "read", commit_then_read)
    assert sweep_orphans(db, LocalStore(data)) == []
    assert (data / folder).is_dir()


@ONLY_SQLITE
def test_a_data_folder_without_jobs_has_no_orphans(db: Database, tmp_path: Path) -> None:
    assert sweep_orphans(db, LocalStore(tmp_path / "nothing")) == []
