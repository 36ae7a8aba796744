"""The id that a database and its store of files share, so that neither is used with another's.

It lies in the file `installation`: of the data folder, or, where the files of jobs lie in a bucket, of that. The data
folder of each host then holds nothing but copies and what is being made, which belong to no installation.
"""

import uuid

import sqlalchemy as sa
from sqlmodel import select

from nanomoe.store.store import Store, StoreRefused
from service.database.database import Database
from service.database.schema import table
from service.errors import NotInstalled, StartRefused
from service.jobs.tables import Installation

FILE = "installation"
"""Name of the file that holds the id."""


def join_installation(db: Database, store: Store, *, create: bool = False) -> str:
    """Make sure that database and store belong together, by the id that both carry; returns it.

    `create` (the API, once it has migrated) gives a new pair its id; a worker only compares.

    Raises:
        StartRefused: they differ, only one of them has an id, or the store does not let us in.
        NotInstalled: it may only be too early to compare: the API commits the schema first, then writes the file, then
            the database's id.
        StoreUnavailable: the store is out of reach.
    """
    in_store = _read(store)  # before the transaction: a bucket may take its time
    with db.write() if create else db.read() as session:
        if create and not db.is_sqlite:  # one at a time; SQLite has one writer anyway
            session.execute(sa.text("LOCK TABLE installation IN EXCLUSIVE MODE"))
        in_database = session.exec(select(Installation.id)).first()
        if in_database != in_store:
            in_store = _read(store)  # another process may have written both meanwhile
        if create and in_database is None and (in_store is None or not _has_jobs(store)):
            in_database = in_store or uuid.uuid4().hex
            # The file first: should the commit fail, the next start finds a store without jobs and adopts its id.
            store.put(FILE, in_database.encode("ascii"), create=True)
            in_store = in_database
            session.execute(sa.insert(table(Installation)).values(id=in_database, created_at=db.now))
    if in_database is None and not create:
        raise NotInstalled("the database has no installation id yet: the API gives it one when it starts")
    if in_database is None or in_database != in_store:
        place, setting = (
            (f"the data folder {store.location}", "NANOMOE_DATA_DIR")
            if store.is_local
            else (f"the bucket {store.location}", "NANOMOE_STORE")
        )
        raise StartRefused(
            f"the database (installation {in_database}) and {place} (installation {in_store}) "
            f"do not belong together: check NANOMOE_DATABASE_URL and {setting}"
        )
    if create:
        store.check_conditions(FILE)
    return in_database


def _read(store: Store) -> str | None:
    try:
        return store.read(FILE).decode("ascii").strip()
    except FileNotFoundError:
        return None
    except StoreRefused as error:
        raise StartRefused(f"{error.summary}: {error}") from error


def _has_jobs(store: Store) -> bool:
    return next((store / "jobs").entries(1), None) is not None
