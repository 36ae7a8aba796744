"""Whose jobs and sweeps a session's caller may see: the caller's own, or all. What is not visible is not there: it is
neither listed nor found, and whoever names it is answered as for what does not exist."""

from typing import Any, Protocol

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import caller_of
from service.database.schema import table
from service.jobs.tables import Job, Sweep


class HasOwner(Protocol):
    """A row of a job or of a sweep."""

    owner: Any


def visible_jobs(session: Session) -> sa.ColumnElement[bool]:
    """The condition on the table of jobs."""
    return _visible(session, table(Job))


def visible_sweeps(session: Session) -> sa.ColumnElement[bool]:
    """The condition on the table of sweeps."""
    return _visible(session, table(Sweep))


def _visible(session: Session, owned: sa.Table) -> sa.ColumnElement[bool]:
    caller = caller_of(session)
    if caller.sees_all:
        return sa.true()
    # Rows from before there were keys have no owner either: nobody owns them.
    return owned.c.owner == caller.owner if caller.owner else sa.false()


def is_visible(session: Session, row: HasOwner) -> bool:
    """Whether the caller may see a row."""
    caller = caller_of(session)
    return caller.sees_all or (caller.owner != "" and row.owner == caller.owner)
