"""The id that a database and its data folder share, so that neither is used with another's."""

import os
import uuid
from pathlib import Path

import sqlalchemy as sa
from sqlmodel import select

from service.database.database import Database
from service.database.schema import table
from service.errors import NotInstalled, StartRefused
from service.jobs.tables import Installation


def join_installation(db: Database, data_dir: Path, *, create: bool = False) -> str:
    """Make sure that database and data folder belong together, by the id that both carry; returns it.

    `create` (the API, once it has migrated) gives a new pair its id; a worker only compares. Raises StartRefused when
    they differ, or when only one of them has an id; NotInstalled when it may only be too early to compare: the API
    commits the schema first, then writes the file, then the database's id.
    """
    file = data_dir / "installation"
    with db.write() if create else db.read() as session:
        if create and not db.is_sqlite:  # one at a time; SQLite has one writer anyway
            session.execute(sa.text("LOCK TABLE installation IN EXCLUSIVE MODE"))
        on_disk = file.read_text(encoding="ascii").strip() if file.exists() else None
        in_database = session.exec(select(Installation.id)).first()
        if create and in_database is None and (on_disk is None or not _has_jobs(data_dir)):
            in_database = on_disk or uuid.uuid4().hex
            # The file first: should the commit fail, the next start finds a folder without jobs and adopts its id.
            _write_durably(file, in_database)
            on_disk = in_database
            session.execute(sa.insert(table(Installation)).values(id=in_database, created_at=db.now))
    if in_database is None and not create:
        raise NotInstalled("the database has no installation id yet: the API gives it one when it starts")
    if in_database is None or in_database != on_disk:
        raise StartRefused(
            f"the database (installation {in_database}) and the data folder {data_dir} (installation {on_disk}) "
            "do not belong together: check NANOMOE_DATABASE_URL and NANOMOE_DATA_DIR"
        )
    return in_database


def _has_jobs(data_dir: Path) -> bool:
    jobs = data_dir / "jobs"
    return jobs.is_dir() and any(jobs.iterdir())


def _write_durably(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="ascii") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
