"""Transactions, the clock and the backup, on SQLite and on PostgreSQL."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.database.database import Database
from service.database.opening import open_database
from service.errors import Invalid, NotFound
from service.jobs import reads
from service.jobs.tables import Job
from service.settings import Settings
from tests.databases import ONLY_POSTGRESQL, ONLY_SQLITE, Clock
from tests.races import Races, at_once
from tests.service.database.statements import enter_text, pragma, submit

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
