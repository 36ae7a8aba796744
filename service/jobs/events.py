"""Writing events of jobs, each in the transaction of the change that it describes.

An event has a number in its job, which the job's row keeps, and one in its sweep. To give that, the sweep's row is
locked until the commit: whoever changes several jobs locks their rows first, and takes the sweeps in the order of their
ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.database.schema import table
from service.jobs.statuses import Status
from service.jobs.tables import Event, Job, Sweep


class HasStatus(Protocol):
    """What an event with a status is made from: a job's row, or what stands for many of them."""

    id: str
    sweep_id: str | None
    status: Status
    status_reason: str | None
    attempt: int
    error: dict[str, Any] | None
    event_seq: int
    """Number of the event."""


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


def log_status(db: Database, session: Session, job: Job) -> None:
    """Add an event with the status of a job, whose `event_seq` is the event's number."""
    log_event(db, session, job, job.event_seq, "status", _status(job))


def log_statuses(db: Database, session: Session, jobs: Sequence[HasStatus]) -> None:
    """Add an event with the status of each of some jobs of one sweep. `event_seq` of a job is its event's number."""
    if not jobs:
        return
    sweep_id = jobs[0].sweep_id
    last = _number_in_sweep(session, sweep_id, len(jobs))
    assert last is not None
    rows = [
        {"job_id": job.id, "seq": job.event_seq, "data": _status(job), "sweep_seq": number}
        for number, job in enumerate(jobs, last - len(jobs) + 1)
    ]
    insert = sa.insert(table(Event)).values(kind="status", created_at=db.now, sweep_id=sweep_id)
    session.execute(insert, rows)


def log_warnings(
    db: Database, session: Session, job: Job, last_seq: int, warnings: Sequence[Mapping[str, str]]
) -> None:
    """Add one event a warning; the last has the number `last_seq`."""
    for seq, warning in enumerate(warnings, last_seq - len(warnings) + 1):
        log_event(db, session, job, seq, "warning", warning)


def log_event(db: Database, session: Session, job: Job, seq: int, kind: str, data: Mapping[str, Any]) -> None:
    """Add an event with the number `seq`. Of `job` only what never changes is read."""
    values = {"job_id": job.id, "seq": seq, "kind": kind, "created_at": db.now, "data": data, "sweep_id": job.sweep_id}
    number = _number_in_sweep(session, job.sweep_id, 1)
    session.execute(sa.insert(table(Event)).values(**values, sweep_seq=number))


def _status(job: HasStatus) -> dict[str, Any]:
    return {
        "status": job.status,
        "status_reason": job.status_reason,
        "attempt": job.attempt,
        "error": job.error,
    }


def _number_in_sweep(session: Session, sweep_id: str | None, n: int) -> int | None:
    """The last of the next `n` numbers of a sweep's events; None for a job of no sweep."""
    if sweep_id is None:
        return None
    sweeps = table(Sweep)
    raised = sa.update(sweeps).where(sweeps.c.id == sweep_id).values(event_seq=sweeps.c.event_seq + n)
    number: int = session.scalars(raised.returning(sweeps.c.event_seq)).one()
    return number
