"""SQLite: which library is used, whether its WAL mode is safe, and an engine with the right pragmas.

A writing transaction takes its lock at the start (BEGIN IMMEDIATE); every commit is flushed to the disk.
"""

import logging
import os
import sqlite3
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from service.database import engine_options
from service.database.change_notification import Source, watch_sqlite
from service.database.error_translation import as_service_errors
from service.database.folders import NETWORK_FILE_SYSTEMS, file_system_type, make_folder
from service.errors import StartRefused

log = logging.getLogger(__name__)

MAX_PATH_BYTES = 504
"""Longest absolute path of a database: SQLite's limit of 512, less the suffix `-journal` (measured with 3.53)."""


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


def open_sqlite(url: URL) -> tuple[Engine, Source]:
    """An engine on a SQLite file, which is created if need be, and the source of its change notifications.

    Raises StartRefused for a SQLite that is too old, a database in memory, a path that is too long, and a network file
    system.
    """
    driver = sqlite_driver()
    if driver.sqlite_version_info < (3, 35, 0):
        raise StartRefused(f"SQLite {driver.sqlite_version} is too old: UPDATE ... RETURNING needs 3.35")
    if not url.database or url.database == ":memory:":
        raise StartRefused("the API and the worker are two processes: a SQLite database must be a file")
    file = Path(url.database).absolute()
    if (n_bytes := len(os.fsencode(file))) > MAX_PATH_BYTES:
        raise StartRefused(
            f"SQLite opens no path of more than {MAX_PATH_BYTES} bytes, and that of {file} has {n_bytes}: "
            "choose a shorter NANOMOE_DATA_DIR or NANOMOE_DATABASE_URL"
        )
    make_folder(file.parent)
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
        json_serializer=engine_options.to_json,
        # One for each thread that answers requests: opening one for a moment costs more than what it is asked.
        pool_size=40,
        max_overflow=8,
        pool_timeout=engine_options.LOCK_TIMEOUT_SECONDS,
        connect_args={
            "isolation_level": None,
            "timeout": engine_options.LOCK_TIMEOUT_SECONDS,
            "check_same_thread": False,
        },
    )

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, record: Any) -> None:
        for pragma in (f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred BEGIN that turns to writing fails at once when another writes, whatever the timeout.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    with as_service_errors(), engine.connect():
        pass
    return engine, partial(watch_sqlite, driver, file)
