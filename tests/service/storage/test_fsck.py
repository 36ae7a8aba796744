"""The check behind `nanomoe fsck`: every byte that a row stands for, and no false alarm while jobs run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from nanomoe import checkpoint
from nanomoe.store.local import LocalStore
from service.database.database import Database
from service.database.schema import table
from service.errors import SchemaMismatch
from service.jobs import queue
from service.jobs.tables import Checkpoint
from service.settings import Settings
from service.storage.fsck import check
from service.storage.installation import join_installation
from service.storage.job_folders import checkpoint_folder, job_folder
from tests.databases import ONLY_SQLITE
from tests.service.recorded_files import FILES, job_with_files, snapshot, snapshot_folder


@pytest.fixture
def data(db: Database, settings: Settings) -> Path:
    join_installation(db, LocalStore(settings.data_dir), create=True)
    return settings.data_dir


def test_what_is_whole_is_counted_byte_by_byte(db: Database, data: Path) -> None:
    job_with_files(db, data)
    report = check(db, LocalStore(data))
    assert report.is_clean
    assert (report.n_checkpoints, report.n_snapshots, report.n_bytes) == (2, 1, 2 * (3 + 1024) + 2)
    assert report.orphans == []


def flip_a_bit(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[500] ^= 1
    weights.write_bytes(content)


def forget_a_file_in_the_row(folder: Path, db: Database) -> None:
    with db.write() as session:
        session.execute(sa.update(table(Checkpoint)).where(table(Checkpoint).c.percent == 25).values(files=[]))


@ONLY_SQLITE
@pytest.mark.parametrize(
    ("harm", "kind", "said"),
    [
        (lambda folder, db: shutil.rmtree(folder), "missing", "there is no folder"),
        (lambda folder, db: flip_a_bit(folder), "damaged", "model.safetensors: 1024 bytes, not those"),
        (lambda folder, db: (folder / "config.json").unlink(), "damaged", "config.json"),
        (lambda folder, db: (folder / "manifest.json").write_bytes(b"{}"), "damaged", "manifest.json is not the one"),
        (forget_a_file_in_the_row, "damaged", "lists other files"),
    ],
    ids=["no folder", "a flipped bit", "no file", "another manifest", "another list"],
)
def test_each_harm_to_a_checkpoint_is_named(db: Database, data: Path, harm: Any, kind: str, said: str) -> None:
    claim = job_with_files(db, data)
    folder = checkpoint_folder(claim.job_id, claim.fence, 25)
    harm(data / folder, db)
    (fault,) = check(db, LocalStore(data)).faults
    assert (fault.kind, fault.job_id, fault.percent, fault.folder) == (kind, claim.job_id, 25, folder)
    assert fault.message.startswith("checkpoint 25: ")
    assert said in fault.message


@ONLY_SQLITE
def test_a_damaged_snapshot_is_named_by_its_step(db: Database, data: Path) -> None:
    claim = job_with_files(db, data)
    (data / snapshot_folder(claim.job_id, claim.fence, 9) / "resume.json").write_bytes(b"[]")
    (fault,) = check(db, LocalStore(data)).faults
    assert (fault.kind, fault.percent) == ("damaged", None)
    assert fault.message.startswith("the snapshot of step 9: ")


@ONLY_SQLITE
def test_a_snapshot_replaced_and_a_job_deleted_meanwhile_are_no_faults(
    db: Database, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = job_with_files(db, data)
    other = job_with_files(db, data)
    verify = checkpoint.verify

    def happens_before(folder: Path, sha256: str) -> checkpoint.Manifest:
        monkeypatch.setattr(checkpoint, "verify", verify)
        snapshot(db, data, claim, 12)
        shutil.rmtree(data / snapshot_folder(claim.job_id, claim.fence, 9))
        queue.finish(db, other, "succeeded")
        queue.delete(db, other.job_id)
        shutil.rmtree(data / job_folder(other.job_id))
        return verify(folder, sha256)

    monkeypatch.setattr(checkpoint, "verify", happens_before)
    report = check(db, LocalStore(data))
    assert report.faults == []
    assert (report.n_checkpoints, report.n_snapshots) == (2, 1)


def test_folders_without_a_row_are_listed_and_no_fault(db: Database, data: Path) -> None:
    claim = job_with_files(db, data)
    queue.release(db, claim)
    checkpoint.write(data / checkpoint_folder(claim.job_id, claim.fence, 50), FILES)
    report = check(db, LocalStore(data))
    assert report.is_clean
    assert report.orphans == [checkpoint_folder(claim.job_id, claim.fence, 50)]


def test_the_data_folder_of_another_database_is_said_and_nothing_else(db: Database, data: Path, tmp_path: Path) -> None:
    job_with_files(db, data)
    other = tmp_path / "other"
    other.mkdir()
    (other / "installation").write_text("f" * 32)
    report = check(db, LocalStore(other))
    assert [fault.kind for fault in report.faults] == ["installation"]
    assert (report.n_checkpoints, report.orphans) == (0, [])


@ONLY_SQLITE
def test_a_row_without_its_parent_is_a_fault_of_the_database(db: Database, data: Path) -> None:
    claim = job_with_files(db, data)
    with db.engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql("UPDATE snapshots SET job_id = 'nobody'")
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        connection.exec_driver_sql("BEGIN")
    (fault,) = check(db, LocalStore(data)).faults
    assert fault.kind == "database"
    assert "snapshots refers to no row of jobs" in fault.message
    assert claim.job_id


@ONLY_SQLITE
def test_a_schema_of_another_revision_is_refused(db: Database, data: Path) -> None:
    with db.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
    with pytest.raises(SchemaMismatch):
        check(db, LocalStore(data))
