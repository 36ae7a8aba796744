"""Which SQLite is used, how it is opened, and how its write lock is waited for."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.database import database, engine_options, sqlite
from service.database.database import Database
from service.database.opening import open_database
from service.database.sqlite import sqlite_driver, wal_is_safe
from service.errors import DatabaseUnavailable, StartRefused
from service.jobs import reads
from service.jobs.tables import Job
from service.settings import Settings
from tests.databases import ONLY_SQLITE
from tests.races import Races, at_once
from tests.service.database.statements import enter_text, pragma, submit


@contextmanager
def another_process_writes(db: Database) -> Iterator[Callable[[], None]]:
    """A second process that holds SQLite's write lock until it is told to let go."""
    script = """
import sys
from service.database.sqlite import sqlite_driver
connection = sqlite_driver().connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("COMMIT")
connection.close()
"""
    command = [sys.executable, "-c", script, str(db.engine.url.database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"

        yield process.stdin.close
        if not process.stdin.closed:
            process.stdin.close()
        assert process.wait(30) == 0


@ONLY_SQLITE
def test_a_write_waits_for_a_process_that_holds_the_lock(db: Database, races: Races) -> None:
    with another_process_writes(db) as let_go:
        assert reads.count_jobs(db)["queued"] == 0
        waiting = races.start(submit, db)
        assert not waiting.done()
        let_go()
        assert waiting.result(30).status == "queued"


@ONLY_SQLITE
def test_a_write_lock_held_for_too_long_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_options, "LOCK_TIMEOUT_SECONDS", 0.05)
    db = open_database(settings)
    with another_process_writes(db):
        with pytest.raises(DatabaseUnavailable, match="locked") as refused:
            submit(db)
        assert reads.count_jobs(db)["queued"] == 0
    assert (refused.value.status, refused.value.code) == (503, "database_unavailable")
    assert refused.value.retry_after is not None
    submit(db)
    db.close()


@ONLY_SQLITE
def test_a_deferred_transaction_would_not_wait_for_the_lock(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why every writing transaction begins with BEGIN IMMEDIATE."""
    monkeypatch.setattr(database, "WRITES", {})
    db = open_database(settings)

    def read_then_write() -> None:
        with db.write() as session:
            assert session.execute(sa.select(sa.func.count()).select_from(Job)).scalar_one() == 0
            with ThreadPoolExecutor(1) as pool:
                pool.submit(submit, db).result()
            session.execute(enter_text(db))

    with pytest.raises(DatabaseUnavailable, match="locked"):
        read_then_write()
    db.close()


@ONLY_SQLITE
def test_sqlite_is_opened_safely(db: Database) -> None:
    assert wal_is_safe(sqlite_driver().sqlite_version_info), "the tests should run with a bundled SQLite"
    assert pragma(db, "journal_mode") == "wal"
    assert pragma(db, "synchronous") == 2
    assert pragma(db, "foreign_keys") == 1
    assert pragma(db, "busy_timeout") == engine_options.LOCK_TIMEOUT_SECONDS * 1000


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 44, 5), False), ((3, 44, 6), True), ((3, 45, 0), False), ((3, 50, 6), False), ((3, 50, 7), True),
        ((3, 51, 0), False), ((3, 51, 2), False), ((3, 51, 3), True), ((3, 53, 4), True), ((4, 0, 0), True),
    ],
)  # fmt: skip
def test_the_versions_with_the_wal_reset_bug_are_known(version: tuple[int, int, int], safe: bool) -> None:
    assert wal_is_safe(version) is safe


@ONLY_SQLITE
def test_an_sqlite_with_the_bug_works_without_wal_and_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite, "wal_is_safe", lambda version: False)
    with caplog.at_level(logging.WARNING):
        db = open_database(settings)
    assert "journal_mode=DELETE" in caplog.text
    assert pragma(db, "journal_mode") == "delete"
    before = db.changes.number
    at_once([lambda: submit(db)] * 8)
    assert db.changes.wait(10, before) > before
    db.close()


def test_an_sqlite_without_returning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        sqlite_version_info = (3, 34, 1)
        sqlite_version = "3.34.1"

    monkeypatch.setattr(sqlite, "sqlite_driver", lambda: Old)
    with pytest.raises(StartRefused, match=r"3\.34\.1"):
        open_database(Settings(_env_file=None, data_dir=tmp_path))


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sqlite, "file_system_type", lambda folder: kind)
    with pytest.raises(StartRefused, match="network file system") as refused:
        open_database(Settings(_env_file=None, data_dir=tmp_path))
    assert "NANOMOE_DATABASE_URL" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_database_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="must be a file"):
        open_database(Settings(_env_file=None, data_dir=tmp_path, database_url="sqlite:///:memory:"))
