"""A worker's right to write to the job that it runs: the fence of its claim, checked and renewed by every write."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate
from sqlmodel import Session

from service.database.database import Database
from service.database.utc_time import UtcTime
from service.errors import LeaseLost
from service.jobs.claim_order import RUNNING, jobs
from service.jobs.tables import Job

T = TypeVar("T")


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

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from every other claim, of the same job too."""
        return self.job.id, self.job.fence


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


@dataclass(frozen=True)
class Renewal:
    """A lease to renew, and what its write changes in the job's row."""

    claim: Claim
    progress: Mapping[str, Any] | None = None
    """The new progress; None keeps the last."""

    n_events: int = 0
    """How many events the transaction is going to add."""


def newest(claims: Iterable[Claim]) -> dict[str, Claim]:
    """The newest of these claims of each job. An older one is lost: a worker may have claimed a job again in one slot
    before another slot knows that it has lost it."""
    return {claim.job_id: claim for claim in sorted(claims, key=lambda claim: claim.fence)}


HELD = "held"
"""Parameter of `HOLDS`: the keys of the claims."""


def _holds() -> sa.ColumnElement[bool]:
    held = sa.tuple_(jobs.c.id, jobs.c.fence).in_(sa.bindparam(HELD, expanding=True)) & RUNNING
    locked = sa.select(jobs.c.id).where(held).order_by(jobs.c.id).with_for_update(key_share=True).cte("locked")
    return jobs.c.id.in_(sa.select(locked.c.id)) & held


HOLDS = _holds()
"""Whether a job is run under one of the claims in `HELD`, as the condition of an UPDATE. On PostgreSQL it locks the
rows first, in the order of their ids, in which everybody locks several jobs: two such transactions cannot block each
other in a circle. `key_share`: nobody waits for a submission that starts from one of them."""


def of_each(n: int, name: str, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """A column's new value in an UPDATE of `n` jobs: of the job whose id is the parameter `job_0` it is `NAME_0`, and
    so on."""
    numbered = (
        (sa.bindparam(f"job_{i}", type_=jobs.c.id.type), sa.bindparam(f"{name}_{i}", type_=column.type))
        for i in range(n)
    )
    return sa.case(*numbered, value=jobs.c.id)


def renew_leases(
    db: Database, session: Session, renewals: Sequence[Renewal], **values: Any
) -> dict[tuple[str, int], Renewed]:
    """Check the fence of each claim and renew its lease, in one statement: the first of every write by a worker.
    Returns those that were renewed, by the claim's key; one that is not among them is lost, and nothing may be written
    under it.

    `values`: columns to set beside it, in all of the jobs.
    """
    if not renewals:
        return {}
    claims = newest(one.claim for one in renewals)
    renewals = [one for one in renewals if one.claim is claims[one.claim.job_id]]
    (lease_seconds,) = {one.claim.lease_seconds for one in renewals}  # they are one worker's
    parameters: dict[str, Any] = {
        HELD: [claim.key for claim in claims.values()],
        "lease": timedelta(seconds=lease_seconds),
    }
    for n, one in enumerate(renewals):
        progress = None if one.progress is None else dict(one.progress)
        parameters |= {f"job_{n}": one.claim.job_id, f"progress_{n}": progress, f"events_{n}": one.n_events}
    parameters |= {f"new_{name}": value for name, value in values.items()}
    rows = session.execute(_renewing(db.now, len(renewals), tuple(values)), parameters)
    return {
        (row.id, row.fence): Renewed(
            Intents(row.cancel_requested_at is not None, row.pause_requested_at is not None), row.event_seq
        )
        for row in rows
    }


@lru_cache(maxsize=64)
def _renewing(now: sa.ColumnElement[datetime], n: int, columns: tuple[str, ...]) -> ReturningUpdate[Any]:
    """The statement that renews `n` leases and sets these columns, with parameters: to build it takes longer than to
    run it. They are `HELD`, `lease`, `new_COLUMN`, and of each job by its number `job`, `progress` and `events`."""
    return (
        sa.update(jobs)
        .where(HOLDS)
        .values(
            lease_until=sa.type_coerce(now + sa.bindparam("lease", type_=UtcTime()), UtcTime()),
            progress=sa.func.coalesce(of_each(n, "progress", jobs.c.progress), jobs.c.progress),
            event_seq=jobs.c.event_seq + of_each(n, "events", jobs.c.event_seq),
            **{name: sa.bindparam(f"new_{name}", type_=jobs.c[name].type) for name in columns},
        )
        .returning(jobs.c.id, jobs.c.fence, jobs.c.cancel_requested_at, jobs.c.pause_requested_at, jobs.c.event_seq)
    )


def renew_lease(
    db: Database,
    session: Session,
    claim: Claim,
    *,
    n_events: int = 0,
    progress: Mapping[str, Any] | None = None,
    **values: Any,
) -> Renewed:
    """`renew_leases` of one job. Raises LeaseLost."""
    renewed = renew_leases(db, session, [Renewal(claim, progress, n_events)], **values)
    if claim.key not in renewed:
        raise lost(claim)
    return renewed[claim.key]


def find_requests(db: Database, claims: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Intents]:
    """What users have requested of running jobs, by job id and fence; a job that does not run under its fence any more
    is not among them."""
    running = sa.tuple_(jobs.c.id, jobs.c.fence).in_(claims) & RUNNING
    query = sa.select(jobs.c.id, jobs.c.fence, jobs.c.cancel_requested_at, jobs.c.pause_requested_at).where(running)
    with db.read() as session:
        return {
            (row.id, row.fence): Intents(row.cancel_requested_at is not None, row.pause_requested_at is not None)
            for row in session.execute(query)
        }


def only(outcomes: Sequence[T | LeaseLost]) -> T:
    """The one outcome of a batch of one. Raises it where it is a LeaseLost."""
    (outcome,) = outcomes
    if isinstance(outcome, LeaseLost):
        raise outcome
    return outcome


def lost(claim: Claim) -> LeaseLost:
    """The error of a write under a claim that does not hold any more."""
    return LeaseLost(f"job {claim.job_id} is no longer held under fence {claim.fence}")
