"""Fills the table of jobs within the database: a million submissions would take an hour."""

from typing import Any

import sqlalchemy as sa

from service.database.database import Database
from service.jobs.claim_order import QUEUED, jobs
from service.jobs.counters import raise_counter
from service.jobs.ids import new_id


def fill(db: Database, n: int, **values: Any) -> None:
    """Copy a queued job `n` times, with other values of these columns."""
    if n <= 0:
        return
    columns = [column.name for column in jobs.columns if column.name not in ("id", "seq")]
    row = sa.select(jobs).where(QUEUED).limit(1).subquery()
    first = sa.select(sa.literal(1).label("i")).cte("numbers", recursive=True)
    numbers = first.union_all(sa.select(first.c.i + 1).where(first.c.i < n))
    salt = new_id()
    ids = sa.literal(salt[:-8]) + sa.func.substr(sa.cast(numbers.c.i + 100_000_000, sa.String), 2, 8)
    given = [sa.literal(value) if isinstance(value, str) else value for value in values.values()]
    others = dict(zip(values, given, strict=True))
    with db.write() as session:
        seqs = raise_counter(session, "jobs", n) - n + numbers.c.i
        chosen = sa.select(ids, seqs, *(others[name] if name in others else row.c[name] for name in columns))
        if not db.is_sqlite:
            session.execute(sa.text("SET LOCAL statement_timeout = 0"))
        rows = chosen.select_from(numbers.join(row, sa.true()))
        session.execute(sa.insert(jobs).from_select(["id", "seq", *columns], rows))
