"""Writing events of jobs, each in the transaction of the change that it describes.

An event has a number in its job, which the job's row keeps, and one among the events of all jobs. On SQLite, which has
one writer, the second is a counter's. On PostgreSQL it is a sequence's, for which no transaction waits: one that took a
lower number may commit later, and who reads the events in their order has to mind that (`numbered_events.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.database.schema import table
from service.jobs.counters import raise_counter
from service.jobs.statuses import Status
from service.jobs.tables import EVENT_COUNTER, EVENT_NUMBERS, Event, Job


class HasStatus(Protocol):
    """What an event with a status is made from: a job's row, or what stands for many of them."""

    id: str
    sweep_id: str | None
    status: Status
    status_reason: str | None
    attempt: int
    error: dict[str, Any] | None
    event_seq: int
    """Number of the event in its job."""


@dataclass
class Submitted:
    """A job that has just been queued."""

    id: str
    sweep_id: str | None
    status: Status = "queued"
    status_reason: str | None = None
    attempt: int = 0
    error: dict[str, Any] | None = None
    event_seq: int = 1


def log_status(db: Database, session: Session, job: HasStatus) -> None:
    """Add an event with the status of a job, whose `event_seq` is the event's number in it."""
    log_statuses(db, session, [job])


def log_statuses(db: Database, session: Session, jobs: Sequence[HasStatus]) -> None:
    """Add an event with the status of each job, whose `event_seq` is the event's number in it."""
    rows = [_row(job.id, job.sweep_id, job.event_seq, "status", _status(job)) for job in jobs]
    _insert(db, session, rows)


def log_warnings(
    db: Database, session: Session, job: Job, last_seq: int, warnings: Sequence[Mapping[str, str]]
) -> None:
    """Add one event a warning; the last has the number `last_seq` in its job."""
    first = last_seq - len(warnings) + 1
    rows = [_row(job.id, job.sweep_id, seq, "warning", warning) for seq, warning in enumerate(warnings, first)]
    _insert(db, session, rows)


def log_event(db: Database, session: Session, job: Job, seq: int, kind: str, data: Mapping[str, Any]) -> None:
    """Add an event with the number `seq` in its job. Of `job` only what never changes is read."""
    _insert(db, session, [_row(job.id, job.sweep_id, seq, kind, data)])


def _row(job_id: str, sweep_id: str | None, seq: int, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"job_id": job_id, "sweep_id": sweep_id, "seq": seq, "kind": kind, "data": dict(data)}


def _status(job: HasStatus) -> dict[str, Any]:
    return {
        "status": job.status,
        "status_reason": job.status_reason,
        "attempt": job.attempt,
        "error": job.error,
    }


def _insert(db: Database, session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Insert events, numbered in this order."""
    if not rows:
        return
    insert = sa.insert(table(Event)).values(created_at=db.now)
    if db.is_sqlite:
        first = raise_counter(session, EVENT_COUNTER, len(rows)) - len(rows) + 1
        rows = [row | {"number": number} for number, row in enumerate(rows, first)]
    else:
        # Within the INSERT, whose lock on the table tells readers that numbers may be taken and not committed yet.
        insert = insert.values(number=sa.func.nextval(EVENT_NUMBERS.name))
    session.execute(insert, rows)
