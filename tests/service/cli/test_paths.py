"""Folders whose names mean something to a URL, a shell, SQLite or Alembic's configuration are folders like others."""

import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from nanomoe.store.local import LocalStore
from service.cli.processes import Processes
from service.database import migrate
from service.database.opening import open_database
from service.database.sqlite import MAX_PATH_BYTES
from service.errors import StartRefused
from service.jobs import reads
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.settings import Settings, sqlite_url
from service.storage import fsck
from service.storage.installation import join_installation
from tests.api import TEXT
from tests.service.cli.conftest import Run

NAMES = [
    "job%2Fmain",
    "what?",
    "a#b",
    "100%",
    "%(here)s",
    "~",
    "with spaces and a+b",
    "two\nlines",
    "ção 🐈",
    "q'u\"o`t$e;&|",
    "file:x?mode=memory",
    ":memory:",
    "l" * 200,
]
ALL_AT_ONCE = "job%2Fmain ?x=1#y %(here)s\n~ção+'\"$;&"


@pytest.mark.parametrize("name", NAMES)
def test_the_database_lies_in_the_folder_of_that_very_name(name: str, tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path / name / "data")
    with closing(open_database(settings)) as db:
        migrate.upgrade(db)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (settings.data_dir / "nanomoe.db").is_file()
        join_installation(db, LocalStore(settings.data_dir), create=True)
        seen = db.changes.wait(30)
        with closing(open_database(settings)) as other:
            submit_job(other, NewJob(text=TEXT, config={}))
        assert db.changes.wait(30, since=seen) > seen

        copied = tmp_path / name / "copy"
        copied.mkdir()
        db.backup(copied / "nanomoe.db")
        shutil.copy(settings.data_dir / "installation", copied)
        with closing(open_database(Settings(_env_file=None, data_dir=copied))) as copy:
            assert fsck.check(copy, LocalStore(copied)).is_clean
            assert len(reads.list_jobs(copy)) == 1


def test_a_job_is_trained_backed_up_and_checked_in_such_a_folder(
    tmp_path: Path, nanomoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, copied = tmp_path / ALL_AT_ONCE / "data", tmp_path / ALL_AT_ONCE / "copy"
    copied.mkdir(parents=True)
    monkeypatch.setenv("NANOMOE_DATA_DIR", str(data))
    monkeypatch.setenv("NANOMOE_DEVICE", "cpu")
    tiny = ["tokenizer=bytes", "n_layer=1", "n_head=1", "n_embd=8", "block_size=32", "epochs=4"]
    settings = [part for setting in tiny for part in ("--set", setting)]
    with Processes({"NANOMOE_PORT": "0"}, logs=tmp_path) as processes:
        monkeypatch.setenv("NANOMOE_URL", processes.start_api())
        processes.start_worker()
        done = nanomoe("submit", "-", *settings, "--watch", stdin=TEXT.encode())
        assert (done.code, done.err) == (0, "")
        done = nanomoe("backup", str(copied / "nanomoe.db"))
        assert done.code == 0
        # The command that it prints is run as it stands.
        copy_files = done.err[done.err.index("  cp -a ") :]
        subprocess.run(copy_files, shell=True, check=True)  # noqa: S602
    assert sorted(path.name for path in (tmp_path / ALL_AT_ONCE).iterdir()) == ["copy", "data"]
    for folder in (data, copied):
        monkeypatch.setenv("NANOMOE_DATA_DIR", str(folder))
        done = nanomoe("fsck", "--json")
        assert (done.code, done.json["n_checkpoints"], done.json["orphans"]) == (0, 5, [])


@pytest.mark.parametrize(("name", "earlier"), [("job%2Fmain", "job/main/data/nanomoe.db"), ("what?", "what")])
def test_a_folder_of_an_earlier_version_keeps_its_database(name: str, earlier: str, tmp_path: Path) -> None:
    data = tmp_path / name / "data"
    before = Settings(_env_file=None, data_dir=data, database_url=sqlite_url(tmp_path / earlier))
    with closing(open_database(before)) as db:
        migrate.upgrade(db)
        # A new folder beside another's database is none of its folders.
        assert Settings(_env_file=None, data_dir=data).database_url == sqlite_url(data / "nanomoe.db")
        join_installation(db, LocalStore(data), create=True)
        submit_job(db, NewJob(text=TEXT, config={}))
    with closing(open_database(Settings(_env_file=None, data_dir=data))) as db:
        assert len(reads.list_jobs(db)) == 1
        assert join_installation(db, LocalStore(data))


def test_a_backup_may_have_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    with closing(open_database(Settings(_env_file=None, data_dir=tmp_path))) as db:
        db.backup(tmp_path / "ol\udce1.db")
    assert (tmp_path / "ol\udce1.db").is_file()


def test_a_path_that_sqlite_cannot_open_is_refused_with_the_reason(tmp_path: Path) -> None:
    def folder_of(n_bytes: int) -> Path:
        """One in which the database's path has this length."""
        left = n_bytes - len(f"{tmp_path}//nanomoe.db")
        return tmp_path / "/".join(["d" * 99] * (left // 100) + ["e" * (left % 100)])

    with closing(open_database(Settings(_env_file=None, data_dir=folder_of(MAX_PATH_BYTES)))) as db:
        migrate.upgrade(db)
    with pytest.raises(StartRefused, match="no path of more than 504 bytes"):
        open_database(Settings(_env_file=None, data_dir=folder_of(MAX_PATH_BYTES + 1)))


@pytest.mark.parametrize(
    ("name", "said"), [("n" * 300, "File name too long"), ("file/data", "Not a directory"), ("file", "File exists")]
)
def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartRefused, match=rf"the folder .* cannot be made: {said}"):
        open_database(Settings(_env_file=None, data_dir=tmp_path / name))
