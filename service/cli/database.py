"""Opens the database of this machine's settings for a command. The database's modules are imported when one runs."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from nanomoe.store.store import StoreError
from service.cli.usage_error import UsageError
from service.errors import ServiceError, StartRefused
from service.settings import Settings

if TYPE_CHECKING:
    from service.database.database import Database


@contextmanager
def opened_database(here: Settings) -> "Iterator[Database]":
    """The database of these settings, closed at the end of the block; its errors, and those of the store of files, are
    raised as UsageError."""
    from service.database.opening import open_database

    try:
        with closing(open_database(here)) as database:
            yield database
    except StartRefused as error:
        raise UsageError(str(error)) from None
    except ServiceError as error:
        raise UsageError(f"{error.code}: {error.detail}") from None
    except StoreError as error:
        raise UsageError(f"{error.code}: {error}") from None
