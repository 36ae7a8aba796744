"""The line of queued jobs: who goes first, and when a worker will be free for whom. Reads, and changes nothing."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from service.database import Database
from service.queue import CLAIM_ORDER, QUEUED, RUNNING, jobs
from service.store import is_alive
from service.tables import Job, Worker

MAX_POSITION = 1000
"""As far as places are counted."""


@dataclass(frozen=True)
class Place:
    """Of a queued job."""

    position: int
    """How many jobs go first, up to 1,000 (which stands for any more)."""

    estimated_start_at: datetime | None
    """When a worker will be free for the job, by the time that the running jobs still need at their recent speed, and
    not before its `run_at`.

    None where that would be a guess: no worker is alive, a running job has not said how long it needs, or more
    jobs go first than there are slots, because nobody knows yet how long those will take.
    """


def find_place(db: Database, job_id: str) -> Place | None:
    """The place of a job in the line; None unless it is queued."""
    with db.read() as session:
        job = session.get(Job, job_id)
        if job is None or job.status != "queued":
            return None
        now = session.scalars(sa.select(db.now)).one()
        first = session.scalars(sa.select(jobs.c.id).where(QUEUED).order_by(*CLAIM_ORDER).limit(MAX_POSITION)).all()
        n_slots = sum(worker.slots for worker in session.scalars(sa.select(Worker)) if is_alive(worker, now))
        running = session.scalars(sa.select(jobs.c.progress).where(RUNNING)).all()
    position = first.index(job_id) if job_id in first else MAX_POSITION
    free_in = _free_in(n_slots, [progress.get("eta_seconds") for progress in running])
    if position >= min(len(free_in), MAX_POSITION):
        return Place(position, None)
    return Place(position, max(job.run_at, now + timedelta(seconds=free_in[position])))


def _free_in(n_slots: int, needed: list[float | None]) -> list[float]:
    """Seconds until a slot is free for the first in line, the second and so on, as far as that is known. `needed`: by
    each running job, None where it has not said."""
    known = [seconds for seconds in needed if seconds is not None]
    if len(known) < len(needed) or not n_slots:
        return []
    return sorted([0.0] * (n_slots - len(known)) + known)[:n_slots]
