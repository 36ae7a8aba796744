"""The schema that migrations make is the one that the tables declare, and migrating loses nothing."""

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.database import migrate
from service.database.database import Database
from service.database.opening import open_database
from service.database.schema import REVISION, Row
from service.database.utc_time import EPOCH
from service.errors import SchemaMismatch, StartRefused
from service.jobs import queue, reads
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity
from service.settings import Settings
from tests.databases import ONLY_SQLITE
from tests.races import at_once


@pytest.fixture
def empty(db: Database, tmp_path: Path) -> Iterator[Database]:
    """A database of the same kind as `db`, without any table."""
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    if not db.is_sqlite:
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("CREATE DATABASE empty"))
        url = db.engine.url.set(database="empty").render_as_string(hide_password=False)
    database = open_database(Settings(_env_file=None, data_dir=tmp_path, database_url=url))
    yield database
    database.close()
    if not db.is_sqlite:
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("DROP DATABASE empty"))


def schema(db: Database) -> dict[str, Any]:
    """All that the database tells of its tables, Alembic's own left out."""
    with db.engine.connect() as connection:
        inspector = sa.inspect(connection)
        names = sorted(set(inspector.get_table_names()) - {"alembic_version", "clock"})
        found: dict[str, Any] = {}
        for name in names:
            columns = [(c["name"], str(c["type"]), c["nullable"], c["default"]) for c in inspector.get_columns(name)]
            found[name] = {
                "columns": sorted(columns),  # a column that is added later comes last, wherever it is declared
                "primary key": inspector.get_pk_constraint(name),
                "foreign keys": sorted(inspector.get_foreign_keys(name), key=str),
                "checks": sorted(inspector.get_check_constraints(name), key=str),
            }
        texts = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
        if not db.is_sqlite:
            texts = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname"
        found["indexes"] = [tuple(row) for row in connection.execute(sa.text(texts)) if "alembic" not in row[0]]
        if db.is_sqlite:
            rowid = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%WITHOUT ROWID%' ORDER BY name"
            found["without rowid"] = [tuple(row) for row in connection.execute(sa.text(rowid))]
    return found


def test_the_migrated_schema_is_the_declared_one(db: Database, empty: Database) -> None:
    Row.metadata.create_all(empty.engine)
    assert schema(db) == schema(empty)


@pytest.mark.filterwarnings("ignore:autogenerate skipping metadata-specified expression-based index")
def test_there_is_nothing_left_to_migrate(db: Database) -> None:
    with db.engine.connect() as connection:
        options = {
            "compare_type": True,
            "compare_server_default": True,
            # Of a SQLite index with DESC only the text can be compared: the test before this one does.
            "include_name": lambda name, kind, parents: not (db.is_sqlite and name == "ix_jobs_claim"),
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Row.metadata) == []


def test_the_code_is_written_for_the_newest_migration(db: Database) -> None:
    assert ScriptDirectory.from_config(migrate.config()).get_heads() == [REVISION]
    assert db.revision() == REVISION
    db.check_revision()


def test_a_new_database_has_no_revision_and_workers_wait(empty: Database) -> None:
    assert empty.revision() is None
    with pytest.raises(SchemaMismatch):
        empty.check_revision()
    migrate.upgrade(empty)
    empty.check_revision()


def test_migrating_again_changes_nothing(db: Database) -> None:
    submit_job(db, NewJob(text="a b", config={}))
    before = schema(db)
    migrate.upgrade(db)
    assert schema(db) == before
    assert reads.count_jobs(db)["queued"] == 1


def test_two_processes_that_migrate_at_once_take_turns(empty: Database) -> None:
    at_once([lambda: migrate.upgrade(empty)] * 2)
    empty.check_revision()


def test_a_database_of_a_newer_version_is_refused(db: Database) -> None:
    with db.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartRefused, match="9999"):
        migrate.upgrade(db)


AFTER = "9000"
"""The revision that comes next."""

REBUILD = f'''
"""Rebuilds the table of jobs, as SQLite must for most changes."""
import sqlalchemy as sa
from alembic import op

revision = "{AFTER}"
down_revision = "{REVISION}"

def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("priority", type_=sa.BigInteger())
    where = sa.text("status = 'queued'")
    columns = [sa.text("priority DESC"), "seq"]
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index("ix_jobs_claim", "jobs", columns, sqlite_where=where, postgresql_where=where)
'''


@pytest.fixture
def next_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's migrations and one more."""
    scripts = tmp_path / "migrations"
    shutil.copytree(migrate.SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / f"{AFTER}_rebuild.py").write_text(REBUILD)
    monkeypatch.setattr(migrate, "SCRIPTS", scripts)


@pytest.mark.usefixtures("next_schema")
def test_a_table_that_is_rebuilt_keeps_its_children(db: Database) -> None:
    job, _ = submit_job(db, NewJob(text="a b", config={}))
    before = schema(db)
    migrate.upgrade(db, AFTER)
    assert db.revision() == AFTER
    assert {**schema(db), "jobs": None} == {**before, "jobs": None}
    assert len(reads.events_after(db, job.id, 0)) == 1
    if db.is_sqlite:
        with db.read() as session:
            assert session.execute(sa.text("PRAGMA foreign_keys")).scalar_one() == 1


@ONLY_SQLITE
@pytest.mark.usefixtures("next_schema")
def test_with_foreign_keys_on_a_rebuilt_table_would_lose_its_children(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = submit_job(db, NewJob(text="a b", config={}))
    monkeypatch.setattr(migrate, "_pragma", lambda connection, pragma: None)
    migrate.upgrade(db, AFTER)
    assert reads.events_after(db, job.id, 0) == []


@pytest.mark.usefixtures("next_schema")
def test_a_migration_that_fails_leaves_nothing_behind(db: Database) -> None:
    script = migrate.SCRIPTS / "versions" / f"{AFTER}_rebuild.py"
    script.write_text(REBUILD + "    raise RuntimeError('half-way')\n")
    before = schema(db)
    with pytest.raises(RuntimeError, match="half-way"):
        migrate.upgrade(db, AFTER)
    assert schema(db) == before
    db.check_revision()
    submit_job(db, NewJob(text="a b", config={}))


# From 0001: every job had a `run_at`, and the order was by it and by the id

MINUTE = 60_000_000
"""In the database's microseconds."""


def insert_as_0001(db: Database, job_id: str, **changes: Any) -> None:
    """A row as that revision wrote it; times are minutes from now."""
    now = (db.time() - EPOCH) // timedelta(microseconds=1)
    minutes = {"created_at": -10, "run_at": -10, "started_at": None} | changes
    times = {
        name: minutes.pop(name) for name in ("created_at", "run_at", "started_at", "finished_at") if name in minutes
    }
    row = {
        "id": job_id, "owner": "", "tags": "{}", "status": "queued", "priority": 0, "fence": 0, "attempt": 0,
        "crashes": 0, "config": "{}", "progress": "{}", "text_sha256": "t", "text_n_bytes": 1, "warnings": "[]",
        "event_seq": 0,
    } | minutes | {name: None if at is None else now + int(at * MINUTE) for name, at in times.items()}  # fmt: skip
    with db.write() as session:
        columns = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        session.execute(sa.text(f"INSERT INTO jobs ({columns}) VALUES ({values})"), row)  # noqa: S608 - the names are ours


@pytest.fixture
def old(empty: Database) -> Database:
    """A database at revision 0001, with one text."""
    migrate.upgrade(empty, "0001")
    with empty.write() as session:
        session.execute(sa.text("INSERT INTO texts VALUES ('t', 1, :content, 0)"), {"content": b"a"})
    return empty


def test_jobs_get_their_numbers_in_the_order_of_their_ids_and_new_ones_go_on(old: Database) -> None:
    for job_id in "cab":
        insert_as_0001(old, job_id)
    migrate.upgrade(old)
    assert [(job.id, job.seq) for job in reads.list_jobs(old)] == [("c", 3), ("b", 2), ("a", 1)]
    assert submit_job(old, NewJob(text="a b", config={}))[0].seq == 4


def test_only_a_date_that_was_asked_for_is_kept(old: Database) -> None:
    insert_as_0001(old, "asked", run_at=60)
    insert_as_0001(old, "asked and passed", run_at=-5)
    insert_as_0001(old, "not asked")
    insert_as_0001(old, "by a clock ahead", created_at=120, run_at=120)
    insert_as_0001(old, "after a crash", run_at=-5, started_at=-9, status="succeeded", finished_at=-1)
    migrate.upgrade(old)
    dated = {job.id: job.run_at for job in reads.list_jobs(old) if job.run_at is not None}
    assert dated.keys() == {"asked", "asked and passed"}
    assert dated["asked"] - old.time() > timedelta(minutes=59)
    assert {job.id for job in reads.list_jobs(old) if job.waits_since is not None} == set()
    claimed = []
    while (found := queue.claim(old, WorkerIdentity(), 60)) is not None:
        claimed.append(found.job_id)
    assert claimed == ["asked and passed", "by a clock ahead", "not asked"]


def test_a_job_that_waits_after_a_crash_waits_on(old: Database) -> None:
    insert_as_0001(old, "waits", run_at=8, started_at=-9)
    insert_as_0001(old, "waited", run_at=-1, started_at=-9)
    insert_as_0001(old, "by a clock ahead", run_at=120, started_at=-9)
    migrate.upgrade(old)
    waits = {job.id: job.waits_seconds for job in reads.list_jobs(old)}
    assert waits["waits"] == pytest.approx(480, abs=60)
    assert (waits["waited"], waits["by a clock ahead"]) == (None, 900)
    assert {job.run_at for job in reads.list_jobs(old)} == {None}
    found = queue.claim(old, WorkerIdentity(), 60)
    assert found is not None
    assert found.job_id == "waited"
    assert queue.claim(old, WorkerIdentity(), 60) is None


# From 0003: events were numbered in their job and in their sweep


def test_events_are_numbered_by_time_and_those_of_a_job_and_of_a_sweep_in_their_order(empty: Database) -> None:
    migrate.upgrade(empty, "0003")
    sweep = "INSERT INTO sweeps (id, seq, owner, tags, created_at, config, parameters, event_seq) "
    event = "INSERT INTO events (job_id, seq, kind, created_at, data, sweep_id, sweep_seq) VALUES "
    with empty.write() as session:
        session.execute(sa.text("INSERT INTO texts VALUES ('t', 1, :content, 0)"), {"content": b"a"})
        session.execute(sa.text(sweep + "VALUES ('s', 1, '', '{}', 0, '{}', '[]', 4)"))
        for seq, job_id in enumerate(("lone", "one", "two"), start=1):
            columns = "id, seq, owner, tags, status, priority, created_at, finished_at, fence, attempt, crashes, config"
            columns += ", progress, text_sha256, text_n_bytes, warnings, event_seq"
            values = f"'{job_id}', {seq}, '', '{{}}', 'cancelled', 0, 0, 0, 0, 0, 0, '{{}}', '{{}}', 't', 1, '[]', 2"
            session.execute(sa.text(f"INSERT INTO jobs ({columns}) VALUES ({values})"))  # noqa: S608 - ours
        for row in (
            "('lone', 1, 'status', 20, '{}', NULL, NULL)",
            "('lone', 2, 'status', 10, '{}', NULL, NULL)",  # the clock was set back between the two
            "('one', 1, 'status', 5, '{}', 's', 1)",
            "('two', 1, 'status', 30, '{}', 's', 2)",
            "('one', 2, 'status', 25, '{}', 's', 3)",
            "('two', 2, 'status', 31, '{}', 's', 4)",
        ):
            session.execute(sa.text(event + row))
    migrate.upgrade(empty)
    with empty.read() as session:
        found = session.execute(sa.text("SELECT job_id, seq, number FROM events ORDER BY number")).all()
    assert [tuple(row) for row in found] == [
        ("one", 1, 1), ("lone", 1, 2), ("lone", 2, 3), ("two", 1, 4), ("one", 2, 5), ("two", 2, 6),
    ]  # fmt: skip
    submit_job(empty, NewJob(text="a b", config={}))
    with empty.read() as session:
        assert session.execute(sa.text("SELECT max(number) FROM events")).scalar_one() == 7
