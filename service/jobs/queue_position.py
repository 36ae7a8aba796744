"""Where a queued job stands, and when a worker will be free for it. Reads, and changes nothing."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.database.utc_time import UtcTime
from service.jobs.claim_order import CLAIM_ORDER, QUEUED, RUNNING, WAIT_ENDS, claimable, jobs
from service.jobs.cohorts import CANDIDATE
from service.jobs.forecast import Slot, Waiting, claims, slots_of
from service.jobs.tables import Job, Worker
from service.jobs.workers import is_alive

MAX_POSITION = 1000
"""Most jobs that are counted ahead of one."""

MAX_WORK_RATIO = 4.0
"""Most times by which the work of two jobs' steps may differ for one's step time to be estimated from the other's:
beyond, a step's fixed costs and the size of its matrix products make such an estimate a guess. Assumed."""


@dataclass(frozen=True)
class QueuePosition:
    """Where a queued job stands."""

    position: int
    """How many jobs are claimed first, up to 1,000, which stands for any larger number. Those that are claimed together
    with it are not counted, and those that others take along are."""

    estimated_start_at: datetime | None
    """When a worker will be free for the job at the latest, and not before its `run_at` and the end of its back-off.

    A running job takes as long as it reports, and the jobs of a cohort have one slot. Jobs ahead in the line are
    claimed together where workers train several together. They are assumed to take, for each step, as long as running
    ones of about the same work; the work of a cohort's step is that of all of its jobs. None where that would be a
    guess: no worker is alive, none has the memory, a running job has not reported how long it takes, or every slot is
    taken by then by jobs unlike all running ones.
    """


@dataclass(frozen=True)
class LongestWait:
    """How long claimable jobs have waited for a worker."""

    since: datetime | None
    """Since when the first job has waited; None when there is none, or the clock was ahead when it began to wait."""

    clock_was_ahead: bool
    """Whether a job began to wait at a time that lies in the future now: the clock has been set back."""


def find_longest_wait(db: Database) -> LongestWait:
    """How long the first claimable job has waited. Reads every queued job."""
    dated = sa.case((jobs.c.run_at > jobs.c.created_at, jobs.c.run_at), else_=jobs.c.created_at)
    began = sa.case((dated < WAIT_ENDS, WAIT_ENDS), else_=dated)
    first, last = sa.func.min(began).filter(began <= db.now), sa.func.max(began)
    query = sa.select(first, sa.func.coalesce(last > db.now, sa.false())).where(claimable(db.now))
    with db.read() as session:
        longest, clock_was_ahead = session.execute(query).one()
    return LongestWait(longest, bool(clock_was_ahead))


@dataclass(frozen=True)
class _Work:
    """The remaining work of a job. None stands for what is not known yet."""

    step_work: float | None
    """Active parameters times tokens of a step, of all jobs that are trained together. Proportional to the
    floating-point operations of a step."""

    steps: int | None
    eta_seconds: float | None
    """Seconds that remain, as the job reported when it last ran."""

    @property
    def step_seconds(self) -> float | None:
        """Recent seconds for each step of a running job."""
        return self.eta_seconds / self.steps if self.eta_seconds is not None and self.steps else None


@dataclass(frozen=True)
class _Cohort:
    """Jobs that one trainer trains together, or one by itself."""

    worker_id: str
    work: list[_Work]


def find_queue_position(db: Database, job_id: str) -> QueuePosition | None:
    """The queue position of a job; None unless it is queued."""
    with db.read() as session:
        job = session.get(Job, job_id)
        if job is None or job.status != "queued":
            return None
        now = session.scalars(sa.select(db.now)).one()
        workers = [worker for worker in session.scalars(sa.select(Worker)) if is_alive(worker, now)]
        position = _count_before(session, job, now, [slot for worker in workers for slot in slots_of(worker)])
        queued = session.execute(_QUEUED_JOBS).all()
        cohorts = _cohorts(session.execute(_RUNNING_JOBS).all())
    known = [work for cohort in cohorts for work in cohort.work]
    slots = [slot for worker in workers for slot in _taken_slots(worker, cohorts, known)]
    rows = {row.id: row for row in queued}
    line = [replace(_waiting(row), ready_in=_ready_in(row, now)) for row in queued]

    def seconds_of(members: Sequence[Waiting]) -> float | None:
        return _longest(_needed_seconds(_work(rows[one.id], len(members)), known) for one in members)

    for claimed in claims(line, slots, seconds_of):
        if any(one.id == job_id for one in claimed.members):
            return QueuePosition(position, now + timedelta(seconds=claimed.seconds))
    return QueuePosition(position, None)


_STEP = ("batch_size", "gradient_accumulation_steps", "block_size")
_WORK = (
    jobs.c.n_active_params,
    jobs.c.n_tokens,
    jobs.c.total_steps,
    jobs.c.progress,
    *(jobs.c.config[name].as_integer().label(name) for name in _STEP),
)
_QUEUED_JOBS = (
    sa.select(*CANDIDATE, jobs.c.run_at, jobs.c.waits_since, jobs.c.waits_seconds, *_WORK)
    .where(QUEUED)
    .order_by(*CLAIM_ORDER)
    .limit(MAX_POSITION)
)
_RUNNING_JOBS = sa.select(jobs.c.id, jobs.c.worker_id, jobs.c.cohort_id, *_WORK).where(RUNNING)


def _count_before(session: Session, job: Job, now: datetime, slots: Sequence[Slot]) -> int:
    """How many jobs are claimed before this one by these slots, were all of them free at the moment from which it may
    be claimed."""
    moment = now + timedelta(seconds=_ready_in(job, now))
    claimable_then = claimable(sa.literal(moment, UtcTime()))
    if all(slot.width == 1 for slot in slots):
        in_line = session.scalars(sa.select(jobs.c.id).where(claimable_then).order_by(*CLAIM_ORDER).limit(MAX_POSITION))
        ids = in_line.all()
        return ids.index(job.id) if job.id in ids else MAX_POSITION
    first = sa.select(*CANDIDATE).where(claimable_then).order_by(*CLAIM_ORDER).limit(MAX_POSITION)
    line = [_waiting(row) for row in session.execute(first)]
    place = next((n for n, one in enumerate(line) if one.id == job.id), MAX_POSITION)
    before = sum(not any(slot.fits(one) for slot in slots) for one in line[:place])
    for claimed in claims(line, slots, lambda members: 1.0):
        if any(one.id == job.id for one in claimed.members):
            return before
        before += len(claimed.members)
    return place


def _ready_in(job: Any, now: datetime) -> float:
    """Seconds until a queued job may be claimed: its `run_at` and its back-off, as in `claim_order.claimable`."""
    ready = [now] if job.run_at is None else [now, job.run_at]
    if job.waits_since is not None and job.waits_since <= now:
        ready.append(job.waits_since + timedelta(seconds=job.waits_seconds))
    return (max(ready) - now).total_seconds()


def _waiting(row: Any) -> Waiting:
    return Waiting(**{column.key: getattr(row, column.key) for column in CANDIDATE})


def _work(row: Any, n_together: int = 1) -> _Work:
    """`n_together`: how many jobs do a step together with this one, itself included."""
    eta_seconds = row.progress.get("eta_seconds")
    if None in (row.n_active_params, row.n_tokens, row.total_steps, *(getattr(row, name) for name in _STEP)):
        return _Work(None, None, eta_seconds)
    tokens_per_step = n_together * min(row.n_tokens, math.prod(getattr(row, name) for name in _STEP))
    return _Work(row.n_active_params * tokens_per_step, row.total_steps - row.progress.get("step", 0), eta_seconds)


def _cohorts(running: Sequence[Any]) -> list[_Cohort]:
    """What runs, the jobs of a cohort together: they have one slot."""
    members: dict[str, list[Any]] = {}
    for row in running:
        members.setdefault(row.cohort_id or row.id, []).append(row)
    return [_Cohort(rows[0].worker_id, [_work(row, len(rows)) for row in rows]) for rows in members.values()]


def _taken_slots(worker: Worker, cohorts: Sequence[_Cohort], known: Sequence[_Work]) -> Iterator[Slot]:
    """The slots of a worker, those of its running jobs first; a slot is free when the last of its jobs has ended."""
    running = [cohort.work for cohort in cohorts if cohort.worker_id == worker.id]
    for number, slot in enumerate(slots_of(worker)):
        if number < len(running):
            slot.free_in = _longest(_needed_seconds(work, known) for work in running[number])
        yield slot


def _longest(seconds: Iterable[float | None]) -> float | None:
    """The largest; None where one is not known."""
    found = list(seconds)
    return None if None in found else max(one for one in found if one is not None)


def _needed_seconds(work: _Work, known: Sequence[_Work]) -> float | None:
    """How long the rest of a job takes: as it reported, else by the step time of the running job of the most similar
    work."""
    if work.eta_seconds is not None:
        return work.eta_seconds
    if work.step_work is None or work.steps is None:
        return None
    found = [
        (work.step_work / other.step_work, other.step_seconds)
        for other in known
        if other.step_work and other.step_seconds is not None
    ]
    ratio, step_seconds = min(found, key=lambda one: abs(math.log(one[0])), default=(math.inf, math.inf))
    return work.steps * step_seconds * ratio if 1 / MAX_WORK_RATIO <= ratio <= MAX_WORK_RATIO else None
