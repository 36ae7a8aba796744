"""Reading, writing and failing alike on both databases, and what SQLite needs to be safe."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.database import database, engine_options, sqlite
from service.database.database import Database
from service.database.folders import file_system_type, find_file_system
from service.database.opening import open_database
from service.database.sqlite import sqlite_driver, wal_is_safe
from service.errors import DatabaseUnavailable, Invalid, NotFound, StartRefused, StorageFull
from service.jobs import queue, reads
from service.jobs.new_job import NewJob
from service.jobs.tables import Job, Text, Worker
from service.settings import Settings
from tests.databases import ONLY_POSTGRESQL, ONLY_SQLITE, Clock
from tests.races import Races, at_once


def submit(db: Database, text: str = "a b") -> Job:
    return queue.submit(db, NewJob(text=text, config={}))[0]


def enter_text(db: Database) -> sa.Insert:
    return sa.insert(Text).values(sha256="a", n_bytes=1, content=b"a", created_at=db.now)


def pragma(db: Database, name: str) -> Any:
    with db.read() as session:
        return session.execute(sa.text(f"PRAGMA {name}")).scalar_one()


# Transactions


def test_a_write_that_raises_leaves_nothing(db: Database) -> None:
    with pytest.raises(ZeroDivisionError), db.write() as session:
        session.execute(enter_text(db)).rowcount / 0
    with pytest.raises(NotFound):
        reads.get_text(db, "a")


def test_a_read_sees_one_moment(db: Database) -> None:
    with db.read() as session:
        assert session.execute(sa.select(sa.func.count()).select_from(Job)).scalar_one() == 0
        submit(db)
        assert session.execute(sa.select(sa.func.count()).select_from(Job)).scalar_one() == 0
    assert reads.count_jobs(db)["queued"] == 1


def test_rows_stay_usable_after_their_session(db: Database) -> None:
    job = reads.get_job(db, submit(db).id)
    assert (job.config, job.tags, job.finished_at) == ({}, {}, None)


def test_a_reader_is_not_kept_waiting_by_a_writer(db: Database, races: Races) -> None:
    held = races.hold(submit, db)
    assert reads.count_jobs(db)["queued"] == 0
    held.let_go()


def test_many_writers_take_turns(db: Database) -> None:
    jobs = at_once([lambda: submit(db)] * 30)
    assert len({job.id for job in jobs}) == 30


# The clock


def test_the_clock_is_in_utc_and_moves(db: Database) -> None:
    before = datetime.now(UTC)
    seen = [db.time() for _ in range(3)]
    after = datetime.now(UTC)
    assert before - timedelta(milliseconds=2) <= seen[0] <= seen[1] <= seen[2] <= after + timedelta(milliseconds=2)


def test_the_clock_moves_within_a_transaction(db: Database) -> None:
    """A transaction that waited for a lock must not write the time at which it began to wait."""
    with db.write() as session:
        first = session.scalars(sa.select(db.now)).one()
        while session.scalars(sa.select(db.now)).one() == first:
            pass


def test_times_are_kept_to_the_microsecond(db: Database, clock: Clock) -> None:
    clock.advance(1e-6)
    assert submit(db).created_at == clock.now == db.time()
    with db.read() as session:
        assert session.scalars(sa.select(db.after(1.5))).one() == clock.now + timedelta(seconds=1.5)


# Out of reach


def test_a_locked_database_is_waited_for(db: Database, races: Races) -> None:
    held = races.hold(submit, db)
    waiting = races.start(submit, db)
    assert held.let_go().id != waiting.result().id


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
def test_a_full_disk_is_told_and_the_database_stays_usable(db: Database) -> None:
    job = submit(db)
    db.engine.dispose()

    @sa.event.listens_for(db.engine, "connect")
    def _small_disk(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA max_page_count = 60").close()

    with pytest.raises(StorageFull) as refused:
        submit(db, "x" * 1_000_000)
    assert (refused.value.status, refused.value.code) == (507, "storage_full")
    assert reads.get_job(db, job.id).status == "queued"
    assert queue.request_cancel(db, job.id).status == "cancelled"
    assert pragma(db, "integrity_check") == "ok"


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "nanomoe.db").write_bytes(b"not a database" * 100)
    with pytest.raises(DatabaseUnavailable, match="not a database"):
        open_database(Settings(_env_file=None, data_dir=tmp_path))


@ONLY_POSTGRESQL
def test_a_server_that_comes_back_is_used_again(db: Database) -> None:
    job = submit(db)
    name = db.engine.url.database
    other = sa.create_engine(db.engine.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        ended = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        connection.execute(ended, {"name": name})
        for call in (lambda: reads.get_job(db, job.id), lambda: submit(db), db.time, lambda: queue.rescue(db)):
            with pytest.raises(DatabaseUnavailable):
                call()
        connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    other.dispose()
    assert reads.get_job(db, job.id) == job
    submit(db)


@ONLY_POSTGRESQL
def test_a_connection_that_is_cut_within_a_write_leaves_nothing(db: Database) -> None:

    def write_and_be_cut() -> None:
        with db.write() as session:
            session.execute(enter_text(db))
            session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(DatabaseUnavailable):
        write_and_be_cut()
    with pytest.raises(NotFound):
        reads.get_text(db, "a")


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    url = "postgresql+psycopg://nobody@/nothing?host=/nowhere"
    db = open_database(Settings(_env_file=None, data_dir=tmp_path, database_url=url))
    with pytest.raises(DatabaseUnavailable):
        db.time()
    db.close()


def test_all_connections_in_use_is_told(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    pool: Any = db.engine.pool
    monkeypatch.setattr(pool, "_timeout", 0.01)
    held = [db.engine.connect() for _ in range(pool.size() + pool._max_overflow)]
    with pytest.raises(DatabaseUnavailable, match="in use"):
        db.time()
    for connection in held:
        connection.close()


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_half_a_character_is_refused(db: Database, text: str) -> None:
    with pytest.raises(Invalid), db.write() as session:
        session.execute(sa.insert(Worker).values(id=text))
    assert reads.list_jobs(db) == []


@ONLY_POSTGRESQL
def test_nul_in_a_text_column_is_refused(db: Database) -> None:
    with pytest.raises(Invalid):
        reads.get_job(db, "a\0b")


def test_a_mistake_of_our_own_is_not_passed_off_as_an_outage(db: Database) -> None:
    with pytest.raises(sa.exc.DBAPIError), db.read() as session:
        session.execute(sa.text("SELECT nothing FROM nowhere"))


def test_json_never_carries_nan(db: Database) -> None:
    with pytest.raises((ValueError, sa.exc.StatementError), match="JSON compliant"):
        queue.submit(db, NewJob(text="a b", config={"lr": float("nan")}))


# Opening SQLite


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


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:5 / /proc rw - proc proc rw
41 22 0:44 / /home rw - nfs4 server:/home rw,vers=4.2
42 41 0:45 / /home/ana/local rw - xfs /dev/sdb1 rw
43 22 0:46 / /mnt/my\\040share rw - cifs //server/share rw
44 22 0:47 / /mnt/hidden rw - nfs server:/x rw
45 22 8:9 / /mnt/hidden rw - ext4 /dev/sdc1 rw
46 22 0:48 / /mnt/ação日 rw master:1 - fuse.sshfs me@there: rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", "ext4"),
        ("/var/data", "ext4"),
        ("/home/ana", "nfs4"),
        ("/homework", "ext4"),
        ("/home/ana/local/data", "xfs"),
        ("/mnt/my share/data", "cifs"),
        ("/mnt/hidden", "ext4"),
        ("/mnt/ação日/x", "fuse.sshfs"),
    ],
)
def test_the_nearest_mount_decides(folder: str, kind: str) -> None:
    assert find_file_system(Path(folder), MOUNTS) == kind


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists its mounts in a file")
def test_this_machine_tells_its_file_system(tmp_path: Path) -> None:
    assert file_system_type(Path("/proc")) == "proc"
    assert file_system_type(tmp_path) not in (None, "proc")


def test_a_database_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="must be a file"):
        open_database(Settings(_env_file=None, data_dir=tmp_path, database_url="sqlite:///:memory:"))


# Backup


@ONLY_SQLITE
def test_a_backup_is_a_database_of_its_own(db: Database, races: Races, tmp_path: Path) -> None:
    jobs = [submit(db) for _ in range(5)]
    held = races.hold(submit, db)  # while everything is running
    db.backup(tmp_path / "backup.db")
    held.let_go()
    restored = open_database(
        Settings(_env_file=None, data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/backup.db")
    )
    restored.check_revision()
    assert [reads.get_job(restored, job.id) for job in jobs] == jobs
    assert reads.count_jobs(restored)["queued"] == 5
    assert pragma(restored, "integrity_check") == "ok"
    restored.close()
    with pytest.raises(Invalid, match="exists"):
        db.backup(tmp_path / "backup.db")


@ONLY_POSTGRESQL
def test_a_backup_of_postgresql_is_its_own_tools_matter(db: Database, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="pg_dump"):
        db.backup(tmp_path / "backup.db")


# Imports


def test_the_worker_can_import_the_queue_without_the_web_and_without_torch() -> None:
    script = (
        "import sys, service.jobs.queue, service.jobs.reads, service.settings, service.errors;"
        "print([m for m in ('fastapi', 'starlette', 'torch', 'alembic', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"
