"""Errors of SQLAlchemy and the drivers, raised as the service's own."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import exc

from service.errors import DatabaseUnavailable, Invalid, StorageFull, TransactionBlocked

# SQLite's own numbers: busy, locked, readonly, ioerr, corrupt, cantopen, protocol, notadb.
_SQLITE_OUT_OF_REACH = (5, 6, 8, 10, 11, 14, 15, 26)
_SQLITE_FULL = 13
_POSTGRESQL_FULL = "53100"
# PostgreSQL's own names: lock_not_available, deadlock_detected.
_POSTGRESQL_BLOCKED = ("55P03", "40P01")


@contextmanager
def as_service_errors() -> Iterator[None]:
    """Raise the database's errors within the block as a ServiceError: DatabaseUnavailable when it is out of reach,
    TransactionBlocked when others hold what the block needs, StorageFull when its disk is full, Invalid for a value
    that it cannot hold."""
    try:
        yield
    except exc.TimeoutError as error:
        raise DatabaseUnavailable("all connections to the database are in use") from error
    except exc.DataError as error:
        raise Invalid("invalid_value", "a value does not fit the database (too large, or the character NUL)") from error
    except exc.DBAPIError as error:
        number = getattr(error.orig, "sqlite_errorcode", None)
        if number is None:
            state = getattr(error.orig, "sqlstate", None)
            if state in _POSTGRESQL_BLOCKED:
                raise TransactionBlocked(f"other transactions stand in the way: {error.orig}") from error
            is_full = state == _POSTGRESQL_FULL
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
