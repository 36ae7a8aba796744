"""Where a queued job stands, and when a worker will be free for it. Reads, and changes nothing."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.database.utc_time import UtcTime
from service.jobs.claim_order import CLAIM_ORDER, QUEUED, RUNNING, WAIT_ENDS, claimable, jobs
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
    """How many jobs are claimed first, up to 1,000 (which stands for any larger number)."""

    estimated_start_at: datetime | None
    """When a worker will be free for the job at the latest, and not before its `run_at` and the end of its back-off.

    A running job takes as long as it reports; a job ahead in the queue is assumed to take, for each step, as long as a
    running job of about the same work. None where that would be a guess: no worker is alive, none has the memory, a
    running job has not reported how long it takes, or every slot is taken by then by a job unlike all running ones.
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
    """Active parameters times tokens of a step. Proportional to the floating-point operations of a step."""

    steps: int | None
    eta_seconds: float | None
    """Seconds that remain, as the job reported when it last ran."""

    @property
    def step_seconds(self) -> float | None:
        """Recent seconds for each step of a running job."""
        return self.eta_seconds / self.steps if self.eta_seconds is not None and self.steps else None


@dataclass(frozen=True)
class _Waiting:
    """A queued job."""

    id: str
    ready_in: float
    """Seconds until it may be claimed."""

    training_bytes: int | None
    work: _Work


@dataclass
class _Slot:
    """A slot of a worker that is alive."""

    memory_bytes: int | None
    free_in: float | None
    """Seconds until the slot is free; None when its job has not reported it, infinite when it cannot be estimated."""

    def fits(self, job: _Waiting) -> bool:
        """Whether the worker has the memory for the job."""
        return self.memory_bytes is None or job.training_bytes is None or job.training_bytes <= self.memory_bytes


def find_queue_position(db: Database, job_id: str) -> QueuePosition | None:
    """The queue position of a job; None unless it is queued."""
    with db.read() as session:
        job = session.get(Job, job_id)
        if job is None or job.status != "queued":
            return None
        now = session.scalars(sa.select(db.now)).one()
        position = _count_before(session, job, now)
        queued = [_waiting(row, now) for row in session.execute(_QUEUED_JOBS)]
        running = session.execute(sa.select(jobs.c.worker_id, *_WORK).where(RUNNING)).all()
        workers = [worker for worker in session.scalars(sa.select(Worker)) if is_alive(worker, now)]
    known = [_work(row) for row in running]
    slots = [
        slot
        for worker in workers
        for slot in _slots(worker, [_work(row) for row in running if row.worker_id == worker.id], known)
    ]
    start_in = next((seconds for started, seconds in _starts(queued, slots, known) if started == job_id), None)
    return QueuePosition(position, None if start_in is None else now + timedelta(seconds=start_in))


_STEP = ("batch_size", "gradient_accumulation_steps", "block_size")
_WORK = (
    jobs.c.n_active_params,
    jobs.c.n_tokens,
    jobs.c.total_steps,
    jobs.c.progress,
    *(jobs.c.config[name].as_integer().label(name) for name in _STEP),
)
_QUEUED_JOBS = (
    sa.select(jobs.c.id, jobs.c.run_at, jobs.c.waits_since, jobs.c.waits_seconds, jobs.c.training_bytes, *_WORK)
    .where(QUEUED)
    .order_by(*CLAIM_ORDER)
    .limit(MAX_POSITION)
)


def _count_before(session: Session, job: Job, now: datetime) -> int:
    """How many jobs are claimed before this one at the moment from which it may be claimed."""
    moment = now + timedelta(seconds=_ready_in(job, now))
    first = sa.select(jobs.c.id).where(claimable(sa.literal(moment, UtcTime()))).order_by(*CLAIM_ORDER)
    before = session.scalars(first.limit(MAX_POSITION)).all()
    return before.index(job.id) if job.id in before else MAX_POSITION


def _ready_in(job: Any, now: datetime) -> float:
    """Seconds until a queued job may be claimed: its `run_at` and its back-off, as in `claim_order.claimable`."""
    ready = [now] if job.run_at is None else [now, job.run_at]
    if job.waits_since is not None and job.waits_since <= now:
        ready.append(job.waits_since + timedelta(seconds=job.waits_seconds))
    return (max(ready) - now).total_seconds()


def _waiting(row: Any, now: datetime) -> _Waiting:
    return _Waiting(row.id, _ready_in(row, now), row.training_bytes, _work(row))


def _work(row: Any) -> _Work:
    eta_seconds = row.progress.get("eta_seconds")
    if None in (row.n_active_params, row.n_tokens, row.total_steps, *(getattr(row, name) for name in _STEP)):
        return _Work(None, None, eta_seconds)
    tokens_per_step = min(row.n_tokens, math.prod(getattr(row, name) for name in _STEP))
    return _Work(row.n_active_params * tokens_per_step, row.total_steps - row.progress.get("step", 0), eta_seconds)


def _slots(worker: Worker, running: Sequence[_Work], known: Sequence[_Work]) -> Iterator[_Slot]:
    """The slots of a worker, those of its running jobs first."""
    memory = min((device["memory_bytes"] for device in worker.devices), default=None)
    for number in range(worker.slots):
        yield _Slot(memory, _needed_seconds(running[number], known) if number < len(running) else 0.0)


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


def _starts(queued: Sequence[_Waiting], slots: Sequence[_Slot], known: Sequence[_Work]) -> Iterator[tuple[str, float]]:
    """Job ids and the seconds until each starts, in the order of their starts, as far as they can be estimated: a free
    slot takes the first claimable job that fits. `known`: the running jobs."""
    remaining = [job for job in queued if any(slot.fits(job) for slot in slots)]
    while remaining:
        next_starts = [found for slot in slots if (found := _next_start(remaining, slot)) is not None]
        seconds, slot, job = min(next_starts, key=lambda found: found[0], default=(math.inf, None, None))
        # A slot of unknown time may be free at any moment, though not before those that are free now.
        if slot is None or job is None or (seconds > 0 and any(slot.free_in is None for slot in slots)):
            return
        yield job.id, seconds
        remaining.remove(job)
        needed = _needed_seconds(job.work, known)
        slot.free_in = math.inf if needed is None else seconds + needed


def _next_start(remaining: Sequence[_Waiting], slot: _Slot) -> tuple[float, _Slot, _Waiting] | None:
    """The job that a slot takes next, and in how many seconds; None where that is unknown, or no job fits."""
    free_in = slot.free_in
    if free_in is None or free_in == math.inf:
        return None
    fitting = (job for job in remaining if slot.fits(job))
    if (job := next((job for job in remaining if slot.fits(job) and job.ready_in <= free_in), None)) is not None:
        return free_in, slot, job
    job = min(fitting, key=lambda job: job.ready_in, default=None)
    return None if job is None else (job.ready_in, slot, job)
