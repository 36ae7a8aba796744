"""Bringing the schema to this code's revision. Only the API does this, under a lock, on a connection of its own.

The one module that imports Alembic, and only where something may have to be migrated: workers compare revisions
without it, and a start of the API on a database that needs nothing spares its import, a tenth of the time.
"""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database.database import Database, driver_connection
from service.database.engine_options import WRITES
from service.database.schema import REVISION, read_revision
from service.errors import StartRefused

if TYPE_CHECKING:
    from alembic.config import Config

SCRIPTS = Path(__file__).parent / "migrations"
LOCK = 0x6E616E6F6D6F65
"""Number of PostgreSQL's advisory lock: one migration at a time."""


def config(connection: Connection | None = None) -> "Config":
    """Alembic's configuration for the scripts beside this file; `migrations/env.py` takes the connection from it."""
    from alembic.config import Config

    found = Config()
    found.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    found.set_main_option("path_separator", "newline")
    found.attributes["connection"] = connection
    return found


def upgrade(db: Database, revision: str = REVISION) -> None:
    """Migrate to `revision` in one transaction; all of it or nothing. Two processes at once: the second waits.

    Raises StartRefused when the database is newer than this code.
    """
    if db.revision() == revision:
        return
    with db.engine.connect().execution_options(**WRITES) as connection:
        if db.is_sqlite:
            _upgrade_sqlite(connection, revision)
        else:
            with connection.begin():
                # A table of millions of rows takes its time, and the second process waits for the first.
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
                connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
                _run(connection, revision)


def _upgrade_sqlite(connection: Connection, revision: str) -> None:
    # A table that is rebuilt with foreign keys on empties its children, and the pragma does nothing within a
    # transaction: off before BEGIN, checked before COMMIT.
    _pragma(connection, "foreign_keys=OFF")
    try:
        with connection.begin():
            _run(connection, revision)
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            assert not broken, f"the migration to {revision} left rows without their parents: {broken[:5]}"
    finally:
        _pragma(connection, "foreign_keys=ON")


def _pragma(connection: Connection, pragma: str) -> None:
    with closing(driver_connection(connection).execute(f"PRAGMA {pragma}")):
        pass


def _run(connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory

    found = read_revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}
    if found is not None and found not in known:
        raise StartRefused(f"the database is at schema revision {found}, which is newer than this code: update it")
    command.upgrade(config(connection), revision)
