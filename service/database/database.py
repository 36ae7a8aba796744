"""An open database: one way to read, one way to write, one clock, and a notification of every change.

SQLite and PostgreSQL behave alike from here on: a `read()` sees one snapshot, a `write()` is one short transaction that
took its lock at the start, the clock is the database's, and every error of a driver is a ServiceError. Knows no table.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlmodel import Session

from service.database.change_notification import CHANNEL, Changes
from service.database.engine_options import WRITES
from service.database.error_translation import as_service_errors
from service.database.schema import REVISION, read_revision
from service.database.utc_time import UtcNow, UtcTime
from service.errors import Invalid, SchemaMismatch


class Database:
    """An open database. Thread-safe; a Session from it is not, and must not outlive its `with` block."""

    def __init__(self, engine: Engine, changes: Changes) -> None:
        self.engine = engine
        self.changes = changes
        self.now: sa.ColumnElement[datetime] = UtcNow()
        """The clock, as SQL. A test puts another in its place and lets it jump."""

        self.is_sqlite = engine.dialect.name == "sqlite"
        snapshot = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._readers = engine.execution_options(**snapshot)
        self._writers = engine.execution_options(**WRITES)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session whose queries all see the same moment. Its rows stay usable afterwards.

        Raises DatabaseUnavailable.
        """
        with as_service_errors(), Session(self._readers, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one writing transaction: committed at the end of the block, rolled back by any exception.

        SQLite's write lock is taken at the start (BEGIN IMMEDIATE): a read that turns into a write cannot wait for it.
        Raises DatabaseUnavailable, StorageFull.
        """
        with as_service_errors(), Session(self._writers, expire_on_commit=False) as session, session.begin():
            session.connection()  # begins now, and not with the first statement
            yield session
            session.flush()
            if not self.is_sqlite:
                session.execute(sa.select(sa.func.pg_notify(CHANNEL, "")))

    def time(self) -> datetime:
        """The clock's reading, in UTC."""
        with self.read() as session:
            return session.scalars(sa.select(self.now)).one()

    def after(self, seconds: float) -> sa.ColumnElement[datetime]:
        """The moment `seconds` from now, as SQL."""
        return sa.type_coerce(self.now + sa.literal(timedelta(seconds=seconds), UtcTime()), UtcTime())

    def revision(self) -> str | None:
        """The schema revision the database is at; None before the API has migrated it."""
        with self.read() as session:
            return read_revision(session.connection())

    def check_revision(self) -> None:
        """Raises SchemaMismatch unless the database is at this code's revision."""
        if (found := self.revision()) != REVISION:
            raise SchemaMismatch(found, REVISION)

    def backup(self, file: Path) -> None:
        """Write a consistent copy of a SQLite database to a new file while others go on using it (VACUUM INTO).

        Raises Invalid for PostgreSQL (its own pg_dump does this) and for a file that exists.
        """
        if not self.is_sqlite:
            raise Invalid("backup_not_supported", "PostgreSQL is backed up with its own pg_dump")
        if file.exists():
            raise Invalid("file_exists", f"{file} exists already")
        with as_service_errors(), self.engine.connect() as connection:
            # Past SQLAlchemy's transaction, because VACUUM must run outside of one. As bytes, since a file's name need
            # not be UTF-8.
            driver_connection(connection).execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(file.absolute()),))

    def close(self) -> None:
        """Stop watching for changes and close all connections."""
        self.changes.close()
        self.engine.dispose()


def driver_connection(connection: Connection) -> Any:
    """The driver's own connection below SQLAlchemy's transaction handling."""
    return connection.connection.dbapi_connection
