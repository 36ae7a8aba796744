"""`nanomoe backup` and `nanomoe fsck`, on a real database with real files."""

import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlmodel import select

from nanomoe import checkpoint
from nanomoe.store.local import LocalStore
from nanomoe.store.opening import open_store
from service.database.database import Database
from service.database.opening import open_database
from service.jobs import queue, reads, recording
from service.jobs.tables import Installation
from service.jobs.workers import WorkerIdentity
from service.settings import Settings
from service.storage.installation import join_installation
from service.storage.job_folders import checkpoint_folder
from tests.databases import EITHER, ONLY_POSTGRESQL, ONLY_SQLITE
from tests.service.cli.conftest import Run
from tests.service.recorded_files import job_with_files, snapshot, snapshot_folder


@pytest.fixture
def at(nanomoe: Run, db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line with the settings of a database that has been joined to its data folder."""
    join_installation(db, LocalStore(settings.data_dir), create=True)
    point_to(monkeypatch, settings)
    return nanomoe


def point_to(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setenv("NANOMOE_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("NANOMOE_DATABASE_URL", settings.database_url)


@EITHER
def test_fsck_lists_faults_and_exits_with_1(at: Run, db: Database, settings: Settings) -> None:
    claim = job_with_files(db, settings.data_dir)
    done = at("fsck")
    assert (done.code, done.err) == (0, "")
    assert done.out == "2 checkpoints and 1 snapshots, 0.0 MB: all as recorded\n"

    shutil.rmtree(settings.data_dir / checkpoint_folder(claim.job_id, 1, 25))
    done = at("fsck")
    assert done.code == 1
    assert done.out.splitlines()[0] == (
        f"missing  job {claim.job_id}: checkpoint 25: there is no folder jobs/{claim.job_id}/f1-25"
    )
    assert done.out.splitlines()[1].endswith(": 1 wrong")
    found = at("fsck", "--json").json
    assert (found["clean"], found["n_checkpoints"], found["swept"]) == (False, 2, None)
    assert [(fault["kind"], fault["percent"]) for fault in found["faults"]] == [("missing", 25)]


@ONLY_SQLITE
def test_fsck_lists_orphans_and_removes_them_with_sweep(at: Run, db: Database, settings: Settings) -> None:
    claim = job_with_files(db, settings.data_dir)
    queue.release(db, claim)
    orphan = f"jobs/{claim.job_id}/f1-50.tmp"
    (settings.data_dir / orphan).mkdir()
    done = at("fsck")
    assert done.code == 0
    assert done.out.splitlines()[0] == f"no row  {orphan}"
    assert (settings.data_dir / orphan).is_dir()
    assert at("fsck", "--sweep").out.splitlines()[0] == f"removed  {orphan}"
    assert not (settings.data_dir / orphan).exists()
    assert at("fsck", "--json").json["orphans"] == []


@ONLY_SQLITE
def test_nothing_of_a_folder_that_belongs_to_another_database_is_swept(
    at: Run, db: Database, settings: Settings
) -> None:
    folder = settings.data_dir / "jobs" / ("a" * 32)
    folder.mkdir(parents=True)
    (settings.data_dir / "installation").write_text("f" * 32)
    done = at("fsck", "--sweep")
    assert done.code == 1
    assert done.out.startswith("installation  the database (installation ")
    assert folder.is_dir()


def test_no_database_is_made_where_there_is_none(nanomoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOMOE_DATA_DIR", str(tmp_path / "empty"))
    for command in (["fsck"], ["backup", "copy.db"]):
        done = nanomoe(*command)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"nanomoe: there is no database {tmp_path}/empty/nanomoe.db; check NANOMOE_DATA_DIR")
    assert not (tmp_path / "empty").exists()


@ONLY_SQLITE
def test_a_backup_never_writes_over_a_file(at: Run, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_text("precious")
    done = at("backup", "copy.db")
    assert (done.code, done.out) == (2, "")
    assert done.err == "nanomoe: file_exists: copy.db exists already\n"
    assert (tmp_path / "copy.db").read_text() == "precious"


@ONLY_SQLITE
def test_where_files_lie_in_a_bucket_the_backup_says_so_and_the_check_reads_it(
    at: Run, db: Database, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOMOE_STORE", bucket_url)
    done = at("backup", "copy.db")
    assert (done.code, done.out) == (0, "wrote copy.db\n")
    assert done.err.startswith(f"The files of the jobs are not in it: they lie in {bucket_url}.\n")
    assert "cp " not in done.err
    refused = at("fsck")
    assert refused.code == 1
    assert f"the bucket {bucket_url} (installation None)" in refused.out
    with db.read() as session:
        installation = session.scalars(select(Installation.id)).one()
    open_store(bucket_url).put("installation", installation.encode())
    assert at("fsck", "--json").json["clean"]
    monkeypatch.setattr("service.storage.opening.REQUEST_RETRY_SECONDS", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # where nobody listens
    away = at("fsck")
    assert (away.code, away.err.startswith("nanomoe: store_unavailable: ")) == (2, True)


@ONLY_POSTGRESQL
def test_a_backup_of_postgresql_prints_the_command_and_writes_nothing(at: Run, settings: Settings) -> None:
    done = at("backup", "a copy.dump")
    url = settings.database_url.replace("+psycopg", "")
    assert done.code == 2
    assert done.out.startswith("pg_dump --format=custom '--file=a copy.dump' ")
    assert url.partition("?")[0] in done.out
    assert done.err.startswith("nanomoe: nothing was written: run the command above")
    assert f"the files of the jobs, in {settings.data_dir}/jobs, are copied" in done.err


def test_the_command_for_postgresql_shows_no_password(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOMOE_DATABASE_URL", "postgresql+psycopg://me:secret@db.example:5433/jobs")
    done = nanomoe("backup", "jobs.dump")
    assert done.out == "pg_dump --format=custom --file=jobs.dump --dbname=postgresql://me@db.example:5433/jobs\n"


@ONLY_SQLITE
def test_a_backup_taken_while_a_worker_writes_is_consistent(
    at: Run, db: Database, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, to = settings.data_dir, tmp_path / "backup"
    to.mkdir()
    claim = job_with_files(db, data)
    copied, saved = threading.Event(), threading.Event()

    def work() -> None:
        """Steps all the while, a checkpoint before the copy of the database and one after it."""
        step = 0
        for until, percent in ((copied, 50), (saved, 75)):
            while not until.is_set():
                step += 1
                recording.record_steps(
                    db, claim, {"step": [step], "train_loss": [1.0], "lr": [0.1], "grad_norm": [1.0]}, {}
                )
            folder = checkpoint_folder(claim.job_id, claim.fence, percent)
            manifest, sha256 = checkpoint.write(data / folder, {"config.json": b"{}\n"})
            recording.record_checkpoint(
                db, claim, percent=percent, step=percent, epoch=1, folder=folder, manifest_sha256=sha256,
                files=[entry.model_dump() for entry in manifest.files], metrics={},
            )  # fmt: skip
            recorded[percent].set()

    recorded = {50: threading.Event(), 75: threading.Event()}
    worker = threading.Thread(target=work)
    worker.start()
    shutil.copytree(data / "jobs", to / "jobs")
    copied.set()
    assert recorded[50].wait(30)
    done = at("backup", "backup/nanomoe.db")
    assert (done.code, done.out) == (0, "wrote backup/nanomoe.db\n")
    assert done.err.splitlines()[1] == f"  cp -a {data}/installation {data}/jobs {to}/"
    saved.set()
    assert recorded[75].wait(30)
    worker.join()
    before = data / snapshot_folder(claim.job_id, claim.fence, 9)
    snapshot(db, data, claim, 70)
    shutil.rmtree(before)  # as the worker does; the first copy has it
    shutil.copytree(data / "jobs", to / "jobs", dirs_exist_ok=True)
    shutil.copy(data / "installation", to)

    restored = Settings(_env_file=None, data_dir=to, database_url=f"sqlite:///{to}/nanomoe.db")
    point_to(monkeypatch, restored)
    with sqlite3.connect(to / "nanomoe.db") as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    copy.close()
    done = at("fsck", "--json")
    assert (done.code, done.json["faults"], done.json["n_checkpoints"], done.json["n_snapshots"]) == (0, [], 3, 1)
    # The copied job still counts as running; once its worker is given up, what is newer than the database goes.
    other = open_database(restored)
    job = reads.get_job(other, claim.job_id)
    assert (job.status, job.fence) == ("running", claim.fence)
    queue.release(other, claim)
    assert at("fsck", "--sweep", "--json").json["swept"] == [
        checkpoint_folder(claim.job_id, claim.fence, 75),
        snapshot_folder(claim.job_id, claim.fence, 70),
    ]
    again = queue.claim(other, WorkerIdentity(), 60)
    assert again is not None
    assert again.fence == claim.fence + 1
    other.close()
