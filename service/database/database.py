"""An open database: one way to read, one way to write, one clock, and a notification of every change.

SQLite and PostgreSQL behave alike from here on: a `read()` sees one snapshot, a `write()` is one short transaction that
took its lock at the start, the clock is the database's, and every error of a driver is a ServiceError. Knows no table.
"""

import copy
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlmodel import Session

from service.database.caller import PROCESS, Caller
from service.database.change_notification import CHANNEL, Changes
from service.database.engine_options import WRITES
from service.database.error_translation import as_service_errors
from service.database.schema import REVISION, read_revision
from service.database.utc_time import UtcNow, UtcTime
from service.errors import Invalid, SchemaMismatch, ServiceError

log = logging.getLogger(__name__)

_ANNOUNCE = sa.select(sa.func.set_config("synchronous_commit", "off", True), sa.func.pg_notify(CHANNEL, ""))

_CALLER = "caller"


class Database:
    """An open database. Thread-safe; a Session from it is not, and must not outlive its `with` block."""

    def __init__(self, engine: Engine, changes: Changes) -> None:
        self.engine = engine
        self.changes = changes
        self.now: sa.ColumnElement[datetime] = UtcNow()
        """The clock, as SQL. A test puts another in its place and lets it jump."""

        self._n_begun = itertools.count()
        self.caller = PROCESS
        """On whose behalf it is read and changed; each session carries it (`caller_of`)."""

        self.is_sqlite = engine.dialect.name == "sqlite"
        snapshot = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._readers = engine.execution_options(**snapshot)
        self._writers = engine.execution_options(**WRITES)

    def acting_as(self, caller: Caller) -> Self:
        """The same database, on behalf of `caller`: shares the connections, and must not be closed."""
        same = copy.copy(self)
        same.caller = caller
        return same

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session whose queries all see the same moment. Its rows stay usable afterwards.

        Raises DatabaseUnavailable.
        """
        with as_service_errors(), self._session(self._readers) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one writing transaction: committed at the end of the block, rolled back by any exception.

        SQLite's write lock is taken at the start (BEGIN IMMEDIATE): a read that turns into a write cannot wait for it.
        Raises DatabaseUnavailable, StorageFull.
        """
        next(self._n_begun)
        with as_service_errors(), self._writers.connect() as connection:
            with self._session(connection) as session, session.begin():
                session.connection()  # begins now, and not with the first statement
                yield session
            if not self.is_sqlite:
                _announce(connection)

    def _session(self, bind: Engine | Connection) -> Session:
        return Session(bind, expire_on_commit=False, info={_CALLER: self.caller})

    def n_writes(self) -> int:
        """Writing transactions of this process so far, once."""
        return next(self._n_begun)

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


def caller_of(session: Session) -> Caller:
    """On whose behalf a session of a `Database` reads and writes."""
    caller: Caller = session.info[_CALLER]
    return caller


def _announce(connection: Connection) -> None:
    """Notify who listens of the commit that has just been made through a connection to PostgreSQL.

    After it, and not in it: PostgreSQL commits transactions that notify one after the other, and each would hold up
    all others while it waits for the disk. This one does not wait. Should it fail, or this process end before it,
    listeners look again by themselves: slots within a second, a running job with its next write, requests and streams
    within `wakeups.LOOK_AGAIN_SECONDS`. The commit stands in any case: no error may hide that.
    """
    try:
        with as_service_errors(), connection.execution_options(isolation_level="AUTOCOMMIT").begin():
            connection.execute(_ANNOUNCE)
    except (ServiceError, sa.exc.SQLAlchemyError) as error:
        log.warning("cannot notify of a change: %s", error)


def driver_connection(connection: Connection) -> Any:
    """The driver's own connection below SQLAlchemy's transaction handling."""
    return connection.connection.dbapi_connection
