"""Times in the database: a column type of microseconds since 1970, and the database's clock as SQL.

One arithmetic for SQLite and PostgreSQL; in Python a time is an aware UTC datetime.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Dialect, TypeDecorator
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""The moment that the database's times are counted from."""


class UtcTime(TypeDecorator[datetime]):
    """Microseconds since 1970 in the database, an aware UTC datetime in Python; a timedelta may be added to it."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | timedelta | None, dialect: Dialect) -> int | None:
        if value is None:
            return None
        return (value - EPOCH if isinstance(value, datetime) else value) // timedelta(microseconds=1)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        return None if value is None else EPOCH + timedelta(microseconds=value)


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
