"""Which job or sweep is meant where one is named: by its id, its name, or a unique beginning of its id. Decided here
only."""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal, NamedTuple

import sqlalchemy as sa
from sqlmodel import Session

from nanomoe.config import JOB_ID_PATTERN, JOB_REFERENCE_PATTERN
from service.database.database import Database
from service.database.schema import table
from service.errors import Ambiguous, NotFound
from service.jobs import sweeps
from service.jobs.ids import begins_with
from service.jobs.ownership import visible_jobs, visible_sweeps
from service.jobs.statuses import Status
from service.jobs.tables import Job, Sweep

MIN_PREFIX = 4
"""Fewest characters of an id that stand for it."""

MAX_CANDIDATES = 20
"""Most jobs or sweeps that are listed where several are meant."""

_N_IN_DETAIL = 3

_jobs, _sweeps = table(Job), table(Sweep)
_ID = re.compile(JOB_ID_PATTERN)
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},31}}")
_REFERENCE = re.compile(JOB_REFERENCE_PATTERN)


class Candidate(NamedTuple):
    """A job or a sweep that may be meant."""

    id: str
    name: str | None
    status: Status
    created_at: datetime


_Select = Callable[[Session, sa.ColumnElement[bool]], list[Candidate]]
"""The newest that fulfil a condition first, and one more than are listed if there are more."""


def find_job_id(db: Database, reference: str, *, certain: bool = False) -> str:
    """The id of the job that is meant: a whole id is that id, whether or not there is such a job; anything else is the
    name of one job, or the beginning of one job's id, at least `MIN_PREFIX` characters of it.

    A name stands before the beginning of an id. With `certain`, for what cannot be undone, a name that is the
    beginning of another job's id is ambiguous: else a request sent twice would act on the one job and then the other.

    Raises:
        NotFound: `job_not_found`.
        Ambiguous: `ambiguous_job`.
    """
    return _find(db, "job", _jobs, _select_jobs, reference, certain)


def find_sweep_id(db: Database, reference: str, *, certain: bool = False) -> str:
    """The id of the sweep that is meant, as `find_job_id` finds a job.

    Raises:
        NotFound: `sweep_not_found`.
        Ambiguous: `ambiguous_sweep`.
    """
    return _find(db, "sweep", _sweeps, _select_sweeps, reference, certain)


def _find(
    db: Database, noun: Literal["job", "sweep"], of: sa.Table, select: _Select, reference: str, certain: bool
) -> str:
    if _ID.fullmatch(reference):
        return reference
    found: list[Candidate] = []
    if _REFERENCE.fullmatch(reference):
        with db.read() as session:
            found = select(session, of.c.name == reference)
            if (certain or not found) and _PREFIX.fullmatch(reference):
                by_id = select(session, begins_with(of.c.id, reference))
                found += [one for one in by_id if one not in found]
    if not found:
        raise NotFound(f"{noun}_not_found", f"there is no {noun} {reference!r}")
    if len(found) > 1:
        raise Ambiguous(noun, _detail(noun, reference, found), found[:MAX_CANDIDATES])
    return found[0].id


def _select_jobs(session: Session, condition: sa.ColumnElement[bool]) -> list[Candidate]:
    """The newest of the jobs that the caller may see, and one more than are listed if there are more."""
    columns = (_jobs.c[name] for name in Candidate._fields)
    query = (
        sa.select(*columns)
        .where(condition, visible_jobs(session))
        .order_by(_jobs.c.seq.desc())
        .limit(MAX_CANDIDATES + 1)
    )
    return [Candidate(*row) for row in session.execute(query)]


def _select_sweeps(session: Session, condition: sa.ColumnElement[bool]) -> list[Candidate]:
    columns = (_sweeps.c.id, _sweeps.c.name, _sweeps.c.created_at)
    query = sa.select(*columns).where(condition, visible_sweeps(session)).order_by(_sweeps.c.seq.desc())
    rows = session.execute(query.limit(MAX_CANDIDATES + 1)).all()
    counts = sweeps.count_by_status(session, [row.id for row in rows])
    return [Candidate(row.id, row.name, sweeps.status_of(counts[row.id]), row.created_at) for row in rows]


def _detail(noun: str, reference: str, found: Sequence[Candidate]) -> str:
    n = f"more than {MAX_CANDIDATES}" if len(found) > MAX_CANDIDATES else str(len(found))
    shown = ", ".join(one.id for one in found[:_N_IN_DETAIL])
    more = ", ..." if len(found) > _N_IN_DETAIL else ""
    return f"{reference!r} may mean {n} {noun}s; use an id: {shown}{more}"
