"""The quotas of owners, enforced: at a submission, and at a claim, each within its own transaction.

On PostgreSQL the owner's row is locked first, so that of two submissions at once the second counts the first; SQLite
has one writer. Usage is that of all jobs of the owner, whichever key submitted them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.access.quotas import Quotas
from service.access.tables import Owner
from service.database.database import Database, caller_of
from service.database.schema import table
from service.errors import QuotaExceeded
from service.jobs.tables import Attempt, Checkpoint, Job, Text

DAY = timedelta(hours=24)
"""The time over which seconds of training are counted."""

_jobs = table(Job)
_owners = table(Owner)
_attempts = table(Attempt)
_checkpoints = table(Checkpoint)
_texts = table(Text)


def check_submission(
    db: Database, session: Session, *, n_jobs: int, texts: Mapping[str, int], n_bytes: int = 0
) -> None:
    """Count `n_jobs` new jobs against the quotas of the session's caller, with `n_bytes` of files and with `texts`, the
    bytes of each by its SHA-256: those that the caller has are stored already.

    Raises QuotaExceeded.
    """
    owner = caller_of(session).owner
    quotas = _lock(session, owner)
    if quotas.queued_jobs is not None:
        used = _count_waiting(session, owner)
        if used + n_jobs > quotas.queued_jobs:
            raise QuotaExceeded("queued_jobs", quotas.queued_jobs, used, wanted=n_jobs)
    if quotas.bytes_stored is not None:
        used = _count_bytes(session, owner)
        stored = sa.select(_jobs.c.text_sha256).where(_jobs.c.owner == owner, _jobs.c.text_sha256.in_(texts))
        known = set(session.scalars(stored))
        wanted = n_bytes + sum(size for sha256, size in texts.items() if sha256 not in known)
        # Once they are used, also what takes no more is refused: training writes checkpoints.
        if used >= quotas.bytes_stored or used + wanted > quotas.bytes_stored:
            raise QuotaExceeded("bytes_stored", quotas.bytes_stored, used, wanted=wanted)
    if quotas.device_seconds_per_day is not None:
        seconds = _count_device_seconds(db, session, owner)
        if seconds >= quotas.device_seconds_per_day:
            raise QuotaExceeded("device_seconds_per_day", quotas.device_seconds_per_day, seconds)


def usage_of(db: Database, owner: str) -> list[tuple[str, float, float]]:
    """Name, limit and use of each quota of an owner."""
    with db.read() as session:
        stored = session.scalar(sa.select(_owners.c.quotas).where(_owners.c.name == owner)) or {}
        used: dict[str, Callable[[], float]] = {
            "queued_jobs": lambda: _count_waiting(session, owner),
            "running_jobs": lambda: session.scalars(_count_running(sa.literal(owner))).one(),
            "device_seconds_per_day": lambda: _count_device_seconds(db, session, owner),
            "bytes_stored": lambda: _count_bytes(session, owner),
        }
        return [(name, limit, used[name]()) for name, limit in Quotas.model_validate(stored).given.items()]


def exhausted_owners(moment: sa.ColumnElement[datetime]) -> sa.Select[Any]:
    """The owners whose queued jobs must wait at `moment`: as many run as may, or the day's seconds are used."""
    return sa.select(_owners.c.name).where(_as_many_run() | _seconds_are_used(moment))


def find_waiting_reasons(db: Database, jobs: Iterable[Job]) -> dict[str, str]:
    """Id of each of these jobs that is queued while a quota of its owner is used up, and which quota that is, in words.

    What holds at the moment: nothing of it is stored, and a job that another one has made way for waits no longer.
    """
    queued = {job.id: job.owner for job in jobs if job.status == "queued" and job.owner != ""}
    if not queued:
        return {}
    found = sa.select(
        _owners.c.name,
        sa.case(
            (_as_many_run(), "as many of the owner's jobs run as the quota running_jobs allows"),
            (_seconds_are_used(db.now), "the owner's quota device_seconds_per_day is used up"),
        ).label("reason"),
    ).where(_owners.c.name.in_(set(queued.values())))
    with db.read() as session:
        reasons = {name: reason for name, reason in session.execute(found) if reason is not None}
    return {job_id: f"waiting: {reasons[owner]}" for job_id, owner in queued.items() if owner in reasons}


def _as_many_run() -> sa.ColumnElement[bool]:
    """Whether as many jobs of an owner run as may; not true without a limit."""
    running = _count_running(_owners.c.name).scalar_subquery()
    most: sa.ColumnElement[int] = _owners.c.quotas["running_jobs"].as_integer()
    return running >= most


def _seconds_are_used(moment: sa.ColumnElement[datetime]) -> sa.ColumnElement[bool]:
    """Whether an owner's seconds of the day are used; not true without a limit."""
    seconds = _device_seconds(moment, _owners.c.name).scalar_subquery()
    most: sa.ColumnElement[float] = _owners.c.quotas["device_seconds_per_day"].as_float()
    return seconds >= most


def places_left(owner: sa.ColumnElement[str]) -> sa.ScalarSelect[Any]:
    """How many more jobs of an owner may run; null without a limit."""
    limit = _owners.c.quotas["running_jobs"].as_integer()
    left = limit - _count_running(_owners.c.name).scalar_subquery()
    return sa.select(left).where(_owners.c.name == owner, limit.is_not(None)).scalar_subquery()


def most_running(session: Session) -> int | None:
    """How many jobs of the session's caller may run at once; None without a limit."""
    quotas = session.scalar(sa.select(_owners.c.quotas).where(_owners.c.name == caller_of(session).owner))
    return Quotas.model_validate(quotas or {}).running_jobs


def begin_attempts(db: Database, session: Session, claimed: Sequence[Job]) -> None:
    """Record that jobs which have just been claimed use a device.

    Raises QuotaExceeded when more of an owner's jobs run now than may: another worker has claimed the last one since
    this transaction looked (`places_left`).
    """
    for owner in sorted({job.owner for job in claimed} - {""}):
        limit = _lock(session, owner).running_jobs
        if limit is not None and (running := session.scalars(_count_running(sa.literal(owner))).one()) > limit:
            raise QuotaExceeded("running_jobs", limit, running)
        over = _attempts.c.ended_at < db.after(-DAY.total_seconds())
        session.execute(sa.delete(_attempts).where(_attempts.c.owner == owner, over))
    owned = [{"job_id": job.id, "fence": job.fence, "owner": job.owner} for job in claimed if job.owner != ""]
    if owned:
        session.execute(sa.insert(_attempts).values(started_at=db.now), owned)


def end_attempts(db: Database, session: Session, ended: Sequence[Job]) -> None:
    """Record that jobs use a device no longer."""
    owned = [job.id for job in ended if job.owner != ""]
    if owned:
        begun = sa.update(_attempts).where(_attempts.c.job_id.in_(owned), _attempts.c.ended_at.is_(None))
        session.execute(begun.values(ended_at=db.now))


def _lock(session: Session, owner: str) -> Quotas:
    """The quotas of an owner, whose row stays locked; none where no keys are used."""
    if owner == "":
        return Quotas()
    held = sa.select(_owners.c.quotas).where(_owners.c.name == owner).with_for_update(key_share=True)
    return Quotas.model_validate(session.scalar(held) or {})


def _count_waiting(session: Session, owner: str) -> int:
    # Paused ones, too: else pausing and resuming would go round the quota.
    waiting = _jobs.c.status.in_(("queued", "paused"))
    return session.scalars(sa.select(sa.func.count()).where(_jobs.c.owner == owner, waiting)).one()


def _count_running(owner: sa.ColumnElement[str]) -> sa.Select[Any]:
    # An alias, because the query around it may be about jobs, too.
    job = _jobs.alias("running_job")
    running = job.c.status == sa.literal("running", literal_execute=True)
    return sa.select(sa.func.count()).select_from(job).where(running, job.c.owner == owner)


def _count_bytes(session: Session, owner: str) -> int:
    """Size of the texts, each once, and of the checkpoints' files."""
    used = sa.select(_jobs.c.text_sha256).where(_jobs.c.owner == owner)
    text_bytes = session.scalar(sa.select(sa.func.sum(_texts.c.n_bytes)).where(_texts.c.sha256.in_(used)))
    recorded = sa.select(sa.func.sum(_checkpoints.c.n_bytes)).join(_jobs, _jobs.c.id == _checkpoints.c.job_id)
    return int(text_bytes or 0) + int(session.scalar(recorded.where(_jobs.c.owner == owner)) or 0)


def _count_device_seconds(db: Database, session: Session, owner: str) -> float:
    return float(session.scalars(_device_seconds(db.now, sa.literal(owner))).one())


def _device_seconds(moment: sa.ColumnElement[datetime], owner: sa.ColumnElement[str]) -> sa.Select[Any]:
    """Seconds of the 24 hours before `moment` during which the owner's jobs used a device."""
    now = _microseconds(moment)
    begin = now - int(DAY.total_seconds() * 1_000_000)
    started, ended = _microseconds(_attempts.c.started_at), _microseconds(_attempts.c.ended_at)
    until = sa.func.coalesce(ended, now)
    since = sa.case((started > begin, started), else_=begin)
    used = sa.func.coalesce(sa.func.sum(until - since), 0) / 1e6
    within = _attempts.c.ended_at.is_(None) | (ended > begin)
    return sa.select(sa.cast(used, sa.Float)).where(_attempts.c.owner == owner, within)


def _microseconds(moment: sa.ColumnElement[datetime]) -> sa.ColumnElement[int]:
    return sa.type_coerce(moment, sa.BigInteger)
