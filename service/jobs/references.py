"""Which job is meant where one is named: by its id, its name, or a unique beginning of its id. Decided here only."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from sqlmodel import Session

from nanomoe.config import JOB_ID_PATTERN, JOB_REFERENCE_PATTERN
from service.database.database import Database
from service.database.schema import table
from service.errors import AmbiguousJob, NotFound
from service.jobs.statuses import Status
from service.jobs.tables import Job

MIN_PREFIX = 4
"""Fewest characters of an id that stand for it."""

MAX_CANDIDATES = 20
"""Most jobs that are listed where several are meant."""

_N_IN_DETAIL = 3

_jobs = table(Job)
_ID = re.compile(JOB_ID_PATTERN)
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},31}}")
_REFERENCE = re.compile(JOB_REFERENCE_PATTERN)


class Candidate(NamedTuple):
    """A job that may be meant."""

    id: str
    name: str | None
    status: Status
    created_at: datetime


def find_job_id(db: Database, reference: str, *, certain: bool = False) -> str:
    """The id of the job that is meant: a whole id is that id, whether or not there is such a job; anything else is the
    name of one job, or the beginning of one job's id, at least `MIN_PREFIX` characters of it.

    A name stands before the beginning of an id. With `certain`, for what cannot be undone, a name that is the
    beginning of another job's id is ambiguous: else a request sent twice would act on the one job and then the other.

    Raises:
        NotFound: `job_not_found`.
        AmbiguousJob: several jobs are meant.
    """
    if _ID.fullmatch(reference):
        return reference
    if not _REFERENCE.fullmatch(reference):
        raise NotFound("job_not_found", f"there is no job {reference!r}")
    with db.read() as session:
        found = _select(session, _jobs.c.name == reference)
        if (certain or not found) and _PREFIX.fullmatch(reference):
            found += [one for one in _select(session, _begins_with(reference)) if one not in found]
    if not found:
        raise NotFound("job_not_found", f"there is no job {reference!r}")
    if len(found) > 1:
        raise AmbiguousJob(_detail(reference, found), found[:MAX_CANDIDATES])
    return found[0].id


def _begins_with(prefix: str) -> sa.ColumnElement[bool]:
    # A range, which the index of ids serves in every collation: no hexadecimal digit comes after g.
    return _jobs.c.id.between(prefix, f"{prefix}g")


def _select(session: Session, condition: sa.ColumnElement[bool]) -> list[Candidate]:
    """The newest jobs first, and one more than are listed if there are more."""
    columns = (_jobs.c[name] for name in Candidate._fields)
    query = sa.select(*columns).where(condition).order_by(_jobs.c.seq.desc()).limit(MAX_CANDIDATES + 1)
    return [Candidate(*row) for row in session.execute(query)]


def _detail(reference: str, found: Sequence[Candidate]) -> str:
    n = f"more than {MAX_CANDIDATES}" if len(found) > MAX_CANDIDATES else str(len(found))
    shown = ", ".join(one.id for one in found[:_N_IN_DETAIL])
    more = ", ..." if len(found) > _N_IN_DETAIL else ""
    return f"{reference!r} may mean {n} jobs; use an id: {shown}{more}"
