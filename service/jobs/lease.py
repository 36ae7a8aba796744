"""A worker's right to write to the job that it runs: the fence of its claim, checked and renewed by every write."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.errors import LeaseLost
from service.jobs.claim_order import RUNNING, jobs
from service.jobs.tables import Job


@dataclass(frozen=True)
class Claim:
    """A claimed job: the right to write to it until another claim raises its fence."""

    job: Job
    """The row as it was claimed."""

    lease_seconds: float
    """Length of the lease, from each renewal on."""

    @property
    def job_id(self) -> str:
        return self.job.id

    @property
    def fence(self) -> int:
        return self.job.fence


@dataclass(frozen=True)
class Intents:
    """Requests of users that a worker has to fulfil at the next step boundary. Cancel beats pause."""

    cancel: bool
    pause: bool


@dataclass(frozen=True)
class Renewed:
    """A lease that was renewed."""

    intents: Intents
    event_seq: int
    """The number of the job's newest event, those counted that this write is going to add."""


def renew_lease(
    db: Database,
    session: Session,
    claim: Claim,
    *,
    n_events: int = 0,
    progress: Mapping[str, Any] | None = None,
    **values: Any,
) -> Renewed:
    """Check the claim's fence, renew its lease and set `values`: the first statement of every write by a worker.

    `n_events`: how many events the transaction is going to add. `progress`: the new progress; None keeps the last.
    Raises LeaseLost.
    """
    if progress is not None:
        values["progress"] = dict(progress)
    row = session.execute(
        sa.update(jobs)
        .where(jobs.c.id == claim.job_id, jobs.c.fence == claim.fence, RUNNING)
        .values(lease_until=db.after(claim.lease_seconds), event_seq=jobs.c.event_seq + n_events, **values)
        .returning(jobs.c.cancel_requested_at, jobs.c.pause_requested_at, jobs.c.event_seq)
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"job {claim.job_id} is no longer held under fence {claim.fence}")
    return Renewed(Intents(row.cancel_requested_at is not None, row.pause_requested_at is not None), row.event_seq)
