"""Writing a job's events, each in the transaction of the change that it describes."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.database.schema import table
from service.jobs.tables import Event, Job


def log_status(db: Database, session: Session, job: Job) -> None:
    """Add an event with the status of a job, whose `event_seq` is the event's number."""
    data = {
        "status": job.status,
        "status_reason": job.status_reason,
        "attempt": job.attempt,
        "error": job.error,
    }
    log_event(db, session, job.id, job.event_seq, "status", data)


def log_warnings(
    db: Database, session: Session, job_id: str, last_seq: int, warnings: Sequence[Mapping[str, str]]
) -> None:
    """Add one event a warning; the last has the number `last_seq`."""
    for seq, warning in enumerate(warnings, last_seq - len(warnings) + 1):
        log_event(db, session, job_id, seq, "warning", warning)


def log_event(db: Database, session: Session, job_id: str, seq: int, kind: str, data: Mapping[str, Any]) -> None:
    """Add an event with the number `seq`."""
    events = table(Event)
    session.execute(sa.insert(events).values(job_id=job_id, seq=seq, kind=kind, created_at=db.now, data=data))
