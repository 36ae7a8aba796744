"""Opening the database: one way to read, one way to write, one clock, and word of every change.

SQLite and PostgreSQL behave alike from here on: a `read()` sees one snapshot, a `write()` is one short transaction that
took its lock at the start, the clock is the database's, and whatever goes wrong on the way is a ServiceError. Knows no
job and no query of one.
"""

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction
from sqlmodel import Session

from service.database.change_notification import CHANNEL, Changes, listen_to_postgresql, watch_sqlite
from service.errors import DatabaseUnavailable, Invalid, SchemaMismatch, StartRefused, StorageFull
from service.jobs.tables import Row, UtcTime, table
from service.settings import Settings

log = logging.getLogger(__name__)

REVISION = "0002"
"""The schema that this code is written for: the head of `service/migrations`."""

BUSY_SECONDS = 10.0
"""How long a transaction waits for another process's lock before it is given up."""

WRITES = {"writes": True}
"""Execution options of a connection whose transactions write."""

MAX_SQLITE_PATH_BYTES = 504
"""Longest absolute path of a database: SQLite's limit of 512, less the suffix `-journal` (measured with 3.53)."""

NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "cifs", "smbfs", "smb2", "smb3", "afpfs", "afs", "webdav", "ncpfs"),
    *("ceph", "glusterfs", "lustre", "beegfs", "gpfs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.s3fs", "fuse.rclone"),
    *("fuse.glusterfs", "fuse.ceph", "fuse.gcsfuse", "fuse.juicefs"),
)

alembic_version = sa.table("alembic_version", sa.column("version_num", sa.String))
"""The row in which Alembic keeps the schema's revision."""


class UtcNow(GenericFunction[datetime]):
    """The database's clock, read anew by every statement."""

    type = UtcTime()
    inherit_cache = True


@compiles(UtcNow, "sqlite")
def _sqlite_now(element: UtcNow, compiler: Any, **kw: Any) -> str:
    # Milliseconds are what SQLite's clock has; unixepoch(..., 'subsec') would need 3.42.
    return "CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000"


@compiles(UtcNow, "postgresql")
def _postgresql_now(element: UtcNow, compiler: Any, **kw: Any) -> str:
    # A subquery is evaluated once and may bound an index scan; the bare function is volatile and may not.
    return "(SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint))"


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
        with _told_as_service_errors(), Session(self._readers, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one writing transaction: committed at the end of the block, rolled back by any exception.

        SQLite's write lock is taken at the start (BEGIN IMMEDIATE): a read that turns into a write cannot wait for it.
        Raises DatabaseUnavailable, StorageFull.
        """
        with _told_as_service_errors(), Session(self._writers, expire_on_commit=False) as session, session.begin():
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

    def wait_for_change(self, timeout: float, since: int | None = None) -> int:
        """Wait until anything was committed by anybody, at most `timeout` seconds; returns the number of changes seen.

        Pass the number from before your last look as `since`, so that no change falls between look and wait.
        """
        return self.changes.wait(timeout, since)

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
        with _told_as_service_errors(), self.engine.connect() as connection:
            # Past SQLAlchemy's transaction, because VACUUM must run outside of one. As bytes, since a file's name need
            # not be UTF-8.
            driver_connection(connection).execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(file.absolute()),))

    def close(self) -> None:
        """Stop watching for changes and close all connections."""
        self.changes.close()
        self.engine.dispose()


def open_database(settings: Settings) -> Database:
    """Open the database that the settings name, creating the data folder and an empty SQLite file if need be.

    Neither migrates nor checks the schema: the API migrates (`service.database.migrate`), workers wait for it.
    Raises StartRefused for a network file system, a SQLite that is too old, a driver that is not installed, and a
    folder or a path that cannot be.
    """
    url = make_url(settings.database_url)
    _make_folder(settings.data_dir)
    if url.get_backend_name() == "sqlite":
        return _open_sqlite(url)
    return _open_postgresql(url)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartRefused(f"the folder {folder} cannot be made: {error.strerror}") from error


def read_revision(connection: Connection) -> str | None:
    """The schema revision as Alembic left it."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.select(alembic_version.c.version_num)).scalar_one_or_none()


def driver_connection(connection: Connection) -> Any:
    """The driver's own connection below SQLAlchemy's transaction handling."""
    return connection.connection.dbapi_connection


# SQLite


def sqlite_driver() -> ModuleType:
    """The newest SQLite at hand: the bundled one of `pysqlite3` where its wheel exists, else Python's own."""
    try:
        from pysqlite3 import dbapi2
    except ImportError:
        return sqlite3
    newest: ModuleType = max(sqlite3, dbapi2, key=lambda module: module.sqlite_version_info)
    return newest


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite is free of the WAL-reset bug of 3.7.0 to 3.51.2, which can corrupt a database that two
    connections use (fixed in 3.51.3, 3.50.7 and 3.44.6)."""
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def _open_sqlite(url: URL) -> Database:
    driver = sqlite_driver()
    if driver.sqlite_version_info < (3, 35, 0):
        raise StartRefused(f"SQLite {driver.sqlite_version} is too old: UPDATE ... RETURNING needs 3.35")
    if not url.database or url.database == ":memory:":
        raise StartRefused("the API and the worker are two processes: a SQLite database must be a file")
    file = Path(url.database).absolute()
    if (n_bytes := len(os.fsencode(file))) > MAX_SQLITE_PATH_BYTES:
        raise StartRefused(
            f"SQLite opens no path of more than {MAX_SQLITE_PATH_BYTES} bytes, and that of {file} has {n_bytes}: "
            "choose a shorter NANOMOE_DATA_DIR or NANOMOE_DATABASE_URL"
        )
    _make_folder(file.parent)
    if (kind := file_system_type(file.parent)) in NETWORK_FILE_SYSTEMS:
        raise StartRefused(
            f"{file.parent} lies on a network file system ({kind}), where SQLite's locks do not hold and a database "
            "gets corrupted: set NANOMOE_DATABASE_URL to a local file or to a PostgreSQL server"
        )
    journal = "WAL"
    if not wal_is_safe(driver.sqlite_version_info):
        journal = "DELETE"
        log.warning(
            "SQLite %s can corrupt a database in WAL mode; using journal_mode=DELETE, which is slower. "
            "Install pysqlite3, or a Python with SQLite 3.51.3 or newer",
            driver.sqlite_version,
        )
    engine = sa.create_engine(
        url,
        module=driver,
        json_serializer=_to_json,
        # One for each thread that answers requests: opening one for a moment costs more than what it is asked.
        pool_size=40,
        max_overflow=8,
        pool_timeout=BUSY_SECONDS,
        connect_args={"isolation_level": None, "timeout": BUSY_SECONDS, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, record: Any) -> None:
        for pragma in (f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred BEGIN that turns to writing fails at once when another writes, whatever the timeout.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    with _told_as_service_errors(), engine.connect():
        pass
    return Database(engine, Changes(partial(watch_sqlite, driver, file)))


def file_system_type(folder: Path) -> str | None:
    """The type of the file system that holds `folder`, as the system names it; None where that cannot be told."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return None
    return find_file_system(folder.resolve(), mounts.read_text(encoding="utf-8", errors="surrogateescape"))


def find_file_system(folder: Path, mountinfo: str) -> str | None:
    """The type of the mount in Linux's `mountinfo` (proc(5)) that lies nearest above the absolute path `folder`."""
    found: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        fields, _, source = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4]))
        # A later mount on the same point hides the earlier one.
        if folder.is_relative_to(point) and (found is None or len(point.parts) >= found[0]):
            found = (len(point.parts), source.split()[0])
    return found and found[1]


# PostgreSQL


def _open_postgresql(url: URL) -> Database:
    try:
        engine = sa.create_engine(
            url,
            json_serializer=_to_json,
            pool_size=8,
            max_overflow=8,
            pool_timeout=BUSY_SECONDS,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": 5,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 15_000,
                "options": "-c statement_timeout=60s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s",
            },
        )
    except ModuleNotFoundError as error:
        raise StartRefused("PostgreSQL needs the driver: pip install 'nanomoe[postgres]'") from error
    return Database(engine, Changes(partial(listen_to_postgresql, engine)))


# What both share


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


# SQLite's own numbers: busy, locked, readonly, ioerr, corrupt, cantopen, protocol, notadb.
_SQLITE_OUT_OF_REACH = (5, 6, 8, 10, 11, 14, 15, 26)
_SQLITE_FULL = 13
_POSTGRESQL_FULL = "53100"


@contextmanager
def _told_as_service_errors() -> Iterator[None]:
    try:
        yield
    except exc.TimeoutError as error:
        raise DatabaseUnavailable("all connections to the database are in use") from error
    except exc.DataError as error:
        raise Invalid("invalid_value", "a value does not fit the database (too large, or the character NUL)") from error
    except exc.DBAPIError as error:
        number = getattr(error.orig, "sqlite_errorcode", None)
        if number is None:
            is_full = getattr(error.orig, "sqlstate", None) == _POSTGRESQL_FULL
            is_away = isinstance(error, exc.OperationalError) or error.connection_invalidated
        else:
            is_full = number & 0xFF == _SQLITE_FULL
            is_away = number & 0xFF in _SQLITE_OUT_OF_REACH
        if is_full:
            raise StorageFull("the disk that holds the database is full") from error
        if is_away:
            raise DatabaseUnavailable(f"the database is out of reach: {error.orig}") from error
        raise
    except OverflowError as error:
        raise Invalid("invalid_value", "a number does not fit the database") from error
    except UnicodeEncodeError as error:
        raise Invalid("invalid_text", "a text holds half of a surrogate pair, which is no character") from error


def insert_or_update(session: Session, row: type[Row], values: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Insert a row, or many; where the primary key exists, replace the other columns."""
    insert = _insert(session, row)
    keys = [column.name for column in table(row).primary_key]
    names = values if isinstance(values, dict) else values[0]
    others = {name: insert.excluded[name] for name in names if name not in keys}
    if isinstance(values, dict):
        session.execute(insert.values(**values).on_conflict_do_update(index_elements=keys, set_=others))
    else:
        session.execute(insert.on_conflict_do_update(index_elements=keys, set_=others), values)


def insert_unless_there(session: Session, row: type[Row]) -> Any:
    """An INSERT that does nothing where a unique key exists already, in another transaction's commit too."""
    return _insert(session, row).on_conflict_do_nothing()


def _insert(session: Session, row: type[Row]) -> Any:
    # Any: the two classes have the ON CONFLICT methods in common, but no base that names them.
    return (sqlite_insert if session.get_bind().dialect.name == "sqlite" else postgresql_insert)(row)
