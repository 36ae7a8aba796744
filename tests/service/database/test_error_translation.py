"""Errors of the database as errors of the service, on SQLite and on PostgreSQL."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.database.database import Database
from service.database.opening import open_database
from service.errors import DatabaseUnavailable, Invalid, NotFound, StorageFull
from service.jobs import queue, reads
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.tables import Worker
from service.settings import Settings
from tests.databases import ONLY_POSTGRESQL, ONLY_SQLITE
from tests.races import Races
from tests.service.database.statements import enter_text, pragma, submit


def test_a_locked_database_is_waited_for(db: Database, races: Races) -> None:
    held = races.hold(submit, db)
    waiting = races.start(submit, db)
    assert held.let_go().id != waiting.result().id


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
        submit_job(db, NewJob(text="a b", config={"lr": float("nan")}))
