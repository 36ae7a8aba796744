"""The job queue: every transition of the status of a job that is there, each one short transaction. Jobs come to be in
`submit.py`; no other file changes a status.

    queued -> running -> succeeded | failed | cancelled        queued -> paused | cancelled
    running -> queued (lease lost, drained, crashed,           running -> paused
                       out of memory)
    paused -> queued | cancelled                               terminal is terminal

A claim raises the job's fence, and every later write of the worker that claimed it begins by checking that fence in
the same transaction (`lease.py`): a worker that was slow, stopped or cut off writes nothing once another has claimed
the job. To cancel or pause a running job is a request that its worker reads with its next write; a job that no worker
runs changes its status at once. Knows no HTTP and no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate
from sqlmodel import Session

from service.access import audit
from service.database.database import Database
from service.database.schema import REVISION, alembic_version, table
from service.database.utc_time import UtcTime
from service.errors import Conflict, LeaseLost, NotFound, QuotaExceeded, SchemaMismatch
from service.jobs.claim_order import CLAIM_ORDER, QUEUED, RUNNING, claimable, jobs
from service.jobs.cohorts import lock_cohort
from service.jobs.events import log_status, log_statuses, log_warnings
from service.jobs.ids import new_id
from service.jobs.lease import HELD, HOLDS, Claim, Renewal, lost, newest, of_each, only, renew_leases
from service.jobs.ownership import is_visible, visible_jobs
from service.jobs.quotas import begin_attempts, end_attempts, exhausted_owners, places_left
from service.jobs.reads import load_job
from service.jobs.recording import set_micro_batch
from service.jobs.statuses import TERMINAL, Status
from service.jobs.sweeps import load_sweep
from service.jobs.tables import Job, Snapshot, Sweep, Text, Worker
from service.jobs.workers import WorkerIdentity, is_gone

MAX_CRASHES = 3
"""Abnormal ends since the last new checkpoint after which a job fails for good."""

BACKOFF = timedelta(seconds=15)
"""How long a job waits after its first crash, doubled by each further one."""

MAX_BACKOFF = timedelta(minutes=15)
"""The longest wait after a crash."""

_INTERRUPTED = "interrupted; continues when a worker is free"
"""Status reason of a job that waits for nothing but a worker."""

texts = table(Text)
sweeps = table(Sweep)

_AS_READ = {"synchronize_session": False, "populate_existing": True}
"""The row that RETURNING gives is the truth, whatever the session has read before."""


# By the worker: claiming a job and ending an attempt


def claim(db: Database, worker: WorkerIdentity, lease_seconds: float) -> Claim | None:
    """`claim_jobs` of one job, or None."""
    return next(iter(claim_jobs(db, worker, lease_seconds, 1)), None)


def claim_jobs(
    db: Database, worker: WorkerIdentity, lease_seconds: float, n: int, *, look_first: bool = True
) -> list[Claim]:
    """From queued to running: the first `n` claimable jobs that fit the worker's memory, or as many as there are, in
    the order of the line, each with a fence, an attempt and a lease of its own. Those among them that are more than
    their owner may run stay in the line, and the next claim passes over all of that owner's.

    `look_first`: before locking, so that an idle worker that was woken for nothing takes no write lock and wakes nobody
    else; where jobs are known to wait, it only takes time. Raises SchemaMismatch when the database has moved to another
    revision: the worker must drain.
    """
    while True:
        try:
            return _claim_jobs(db, worker, lease_seconds, n, look_first=look_first)
        except QuotaExceeded:
            # Another worker has claimed the owner's last one meanwhile, which the next look sees.
            continue


def _claim_jobs(db: Database, worker: WorkerIdentity, lease_seconds: float, n: int, *, look_first: bool) -> list[Claim]:
    """`claim_jobs`, once. Raises QuotaExceeded, too, when another worker was faster."""
    look, claim = _claiming(db.now, n, within_memory=worker.memory_bytes is not None)
    values = {
        "claiming_worker": worker.id,
        "memory_bytes": worker.memory_bytes,
        "lease": timedelta(seconds=lease_seconds),
        "seconds_of_lease": lease_seconds,
    }
    if look_first and not _look(db, look, values):
        return []
    with db.write() as session:
        claimed: Sequence[Job] = session.scalars(claim, values, execution_options=_AS_READ).all()
        in_line = sorted(claimed, key=lambda job: (-job.priority, job.seq))
        begin_attempts(db, session, in_line)
        log_statuses(db, session, in_line)
    if not claimed and not look_first:
        _look(db, look, values)  # no job, or another revision
    return [Claim(job, lease_seconds) for job in in_line]


def _look(db: Database, look: sa.Select[tuple[str, str | None]], values: Mapping[str, Any]) -> bool:
    """Whether there is a claimable job. Raises SchemaMismatch."""
    with db.read() as session:
        found = session.execute(look, values).one_or_none()
    revision = None if found is None else found.version_num
    if revision != REVISION:
        raise SchemaMismatch(revision, REVISION)
    return found is not None and found.first is not None


@lru_cache(maxsize=64)
def _claiming(
    now: sa.ColumnElement[datetime], n: int, *, within_memory: bool
) -> tuple[sa.Select[tuple[str, str | None]], ReturningUpdate[Any]]:
    """The two statements of a claim of `n` jobs, which look and claim, with parameters: to build them takes longer than
    to run them. `within_memory`: leave out jobs that need more than the parameter `memory_bytes`."""
    fits = claimable(now) & jobs.c.owner.not_in(exhausted_owners(now))
    if within_memory:
        fits &= jobs.c.training_bytes.is_(None) | (
            jobs.c.training_bytes <= sa.bindparam("memory_bytes", type_=sa.BigInteger)
        )
    line = sa.select(jobs.c.id, jobs.c.owner, jobs.c.priority, jobs.c.seq).where(fits).order_by(*CLAIM_ORDER)
    look = sa.select(
        alembic_version.c.version_num, line.with_only_columns(jobs.c.id).limit(1).scalar_subquery().label("first")
    )
    # The number stands in the statement, because a plan for any number would read the whole table. A CTE that locks
    # runs once, whatever the planner does. `key_share`: a job from which another is submitted meanwhile is not passed
    # over, and no circle arises with a submission, which locks the owner first.
    locked = line.limit(sa.literal(n, literal_execute=True)).with_for_update(skip_locked=True, key_share=True)
    first = locked.cte("first")
    place = sa.func.row_number().over(partition_by=first.c.owner, order_by=(first.c.priority.desc(), first.c.seq))
    by_owner = sa.select(first.c.id, first.c.owner, place.label("place")).subquery("by_owner")
    may_run = by_owner.c.place <= sa.func.coalesce(places_left(by_owner.c.owner), n)
    claim = (
        sa.update(Job)
        .where(jobs.c.id.in_(sa.select(by_owner.c.id).where(may_run)), QUEUED, _AT_REVISION)
        .values(**_claimed(now), cohort_id=None, cohort_size=None)
        .returning(Job)
    )
    return look, claim


_AT_REVISION = sa.exists().where(alembic_version.c.version_num == REVISION)


def _claimed(now: sa.ColumnElement[datetime]) -> dict[str, Any]:
    """What a claim changes in a job's row. The parameters are `claiming_worker`, `lease` and `seconds_of_lease`."""
    return {
        "status": "running",
        "status_reason": None,
        "waits_since": None,
        "waits_seconds": None,
        "fence": jobs.c.fence + 1,
        "attempt": jobs.c.attempt + 1,
        "worker_id": sa.bindparam("claiming_worker"),
        "lease_until": sa.type_coerce(now + sa.bindparam("lease", type_=UtcTime()), UtcTime()),
        "lease_seconds": sa.bindparam("seconds_of_lease"),
        "started_at": sa.func.coalesce(jobs.c.started_at, now),
        "event_seq": jobs.c.event_seq + 1,
    }


def claim_cohorts(
    db: Database, worker: WorkerIdentity, lease_seconds: float, n: int, width: int, *, look_first: bool = True
) -> list[Sequence[Claim]]:
    """From queued to running: for each of `n` slots the first job in line, and with it up to `width` - 1 more that one
    trainer can train together with it (`cohorts.py`), each with a fence, an attempt and a lease of its own; for fewer
    slots where fewer jobs wait. All of it is one transaction.

    `look_first`, and raises, as `claim_jobs`.
    """
    if width == 1:
        return [[claim] for claim in claim_jobs(db, worker, lease_seconds, n, look_first=look_first)]
    while True:
        try:
            return _claim_cohorts(db, worker, lease_seconds, n, width, look_first=look_first)
        except QuotaExceeded:
            continue  # as in `claim_jobs`


def _claim_cohorts(
    db: Database, worker: WorkerIdentity, lease_seconds: float, n: int, width: int, *, look_first: bool
) -> list[Sequence[Claim]]:
    look, _ = _claiming(db.now, 1, within_memory=worker.memory_bytes is not None)
    values = {"memory_bytes": worker.memory_bytes}
    if look_first and not _look(db, look, values):
        return []
    fits = claimable(db.now) & jobs.c.owner.not_in(exhausted_owners(db.now))
    memory_bytes = None if worker.memory_bytes is None else worker.memory_bytes // worker.slots
    if worker.memory_bytes is not None:
        fits &= jobs.c.training_bytes.is_(None) | (jobs.c.training_bytes <= worker.memory_bytes)
    cohorts: list[Sequence[Job]] = []
    with db.write() as session:
        for _ in range(n):
            members = [row.id for row in lock_cohort(session, fits, width, memory_bytes)]
            claimed = _claim_together(db, session, worker, lease_seconds, members) if members else []
            if not claimed:
                break
            cohorts.append(claimed)
        # Once for all of them: owners are locked in the order of their names, whatever the order of their jobs.
        in_line = [job for claimed in cohorts for job in claimed]
        begin_attempts(db, session, in_line)
        log_statuses(db, session, in_line)
    if not cohorts and not look_first:
        _look(db, look, values)  # no job, or another revision
    return [[Claim(job, lease_seconds) for job in claimed] for claimed in cohorts]


def _claim_together(
    db: Database, session: Session, worker: WorkerIdentity, lease_seconds: float, members: Sequence[str]
) -> list[Job]:
    """The UPDATE that claims jobs whose rows are locked, as a cohort where they are several; none at another
    revision."""
    are_several = len(members) > 1
    values = {
        "members": members,
        "claiming_worker": worker.id,
        "lease": timedelta(seconds=lease_seconds),
        "seconds_of_lease": lease_seconds,
        "id_of_cohort": new_id() if are_several else None,
        "size_of_cohort": len(members) if are_several else None,
    }
    claimed: Sequence[Job] = session.scalars(_claiming_together(db.now), values, execution_options=_AS_READ).all()
    return sorted(claimed, key=lambda job: job.seq)


@lru_cache(maxsize=8)
def _claiming_together(now: sa.ColumnElement[datetime]) -> ReturningUpdate[Any]:
    """The statement that claims `members`, as the cohort `id_of_cohort` of `size_of_cohort` jobs."""
    cohort: dict[str, Any] = {"cohort_id": sa.bindparam("id_of_cohort"), "cohort_size": sa.bindparam("size_of_cohort")}
    return (
        sa.update(Job)
        .where(jobs.c.id.in_(sa.bindparam("members", expanding=True)), QUEUED, _AT_REVISION)
        .values(**_claimed(now), **cohort)
        .returning(Job)
    )


@dataclass(frozen=True)
class Finish:
    """The end of an attempt that ran to its end."""

    claim: Claim
    status: Literal["succeeded", "failed"]
    error: dict[str, Any] | None = None
    """`{"code", "message"}`, with failed and only then."""

    reason: str | None = None
    """Why it succeeded before its last step, where it did."""

    progress: dict[str, Any] | None = None
    """The last progress; None keeps the one before."""

    def __post_init__(self) -> None:
        assert (self.status == "failed") == (self.error is not None)


def finish_jobs(db: Database, finishes: Sequence[Finish]) -> list[Job | LeaseLost]:
    """From running to succeeded or failed; to cancelled when that was requested before: several jobs of one worker, in
    one statement. A job whose lease is lost is left out alone."""
    claims = newest(one.claim for one in finishes)
    ends = [one for one in finishes if one.claim is claims[one.claim.job_id]]
    values: dict[str, Any] = {HELD: [one.claim.key for one in ends]}
    for n, one in enumerate(ends):
        values |= {f"job_{n}": one.claim.job_id, f"status_{n}": one.status, f"reason_{n}": one.reason}
        values |= {f"error_{n}": one.error, f"progress_{n}": one.progress}
    with db.write() as session:
        changed: Sequence[Job] = session.scalars(
            _finishing(db.now, len(ends)), values, execution_options=_AS_READ
        ).all()
        end_attempts(db, session, changed)
        _forget_snapshots(session, [job.id for job in changed])
        log_statuses(db, session, changed)
    ended = {(job.id, job.fence): job for job in changed}
    return [ended.get(one.claim.key) or lost(one.claim) for one in finishes]


@lru_cache(maxsize=64)
def _finishing(now: sa.ColumnElement[datetime], n: int) -> ReturningUpdate[Any]:
    """The statement that ends `n` jobs. Its parameters are `HELD` and, of each job by its number, `job`, `status`,
    `reason`, `error` and `progress`."""
    cancelled = jobs.c.cancel_requested_at.is_not(None)
    return (
        sa.update(Job)
        .where(HOLDS)
        .values(
            status=sa.case((cancelled, "cancelled"), else_=of_each(n, "status", jobs.c.status)),
            error=sa.case((cancelled, jobs.c.error), else_=of_each(n, "error", jobs.c.error)),
            status_reason=sa.case((cancelled, None), else_=of_each(n, "reason", jobs.c.status_reason)),
            progress=sa.func.coalesce(of_each(n, "progress", jobs.c.progress), jobs.c.progress),
            lease_until=None,
            lease_seconds=None,
            finished_at=now,
            event_seq=jobs.c.event_seq + 1,
        )
        .returning(Job)
    )


def finish(
    db: Database,
    claim: Claim,
    status: Literal["succeeded", "failed"],
    *,
    error: dict[str, Any] | None = None,
    reason: str | None = None,
    progress: dict[str, Any] | None = None,
) -> Job:
    """`finish_jobs` of one job. Raises LeaseLost."""
    return only(finish_jobs(db, [Finish(claim, status, error, reason, progress)]))


@dataclass(frozen=True)
class Release:
    """The end of an attempt that did not run to the job's end. Without anything but the claim the worker drains, or
    obeys a request. The trainer has left the job, or is dead."""

    claim: Claim
    crash: str | None = None
    """How the trainer ended abnormally."""

    external_cause: str | None = None
    """The error outside of the job; the job waits, and no crash is counted."""

    pause_reason: str | None = None
    """The worker's own reason to pause the job, such as a full disk."""

    interrupted: str = _INTERRUPTED
    """The status reason of a job that waits for nothing but a worker."""

    cohort_most: int | None = None
    """Most jobs that are claimed together with it from now on, where memory ran out for those that were; else None. No
    crash is counted: a cohort can be halved only so often."""

    micro_batch: int | None = None
    """Micro-batch of the next attempt, where the system killed the trainer because memory ran out; else None. No crash
    is counted: a micro-batch can be halved only so often."""

    warnings: Sequence[Mapping[str, str]] = ()
    """`{"code", "message"}` each."""


def release_jobs(db: Database, releases: Sequence[Release]) -> list[Job | LeaseLost]:
    """From running to queued, when a worker drains, when its trainer ended abnormally, or after an error outside of the
    job; to failed, when the job crashed too often; to paused, when that is still requested, or the worker has a reason
    of its own; to cancelled, when that is requested: several jobs of one worker, in one transaction. A job whose lease
    is lost is left out alone."""
    with db.write() as session:
        renewed = renew_leases(db, session, [Renewal(one.claim, n_events=len(one.warnings)) for one in releases])
        # One moment for all of them: the members of a cohort wait equally long, and are claimed together again.
        now = session.scalars(sa.select(db.now)).one()
        return [
            _release(db, session, one, renewed[one.claim.key].event_seq, now)
            if one.claim.key in renewed
            else lost(one.claim)
            for one in releases
        ]


def _release(db: Database, session: Session, one: Release, event_seq: int, now: datetime) -> Job:
    """Release a job whose lease the transaction has renewed. `event_seq`: of the last of its warnings."""
    job_id = one.claim.job_id
    changes: dict[str, Any] = {}
    if one.crash is not None:  # whose fault it was in a cohort is found by training each alone from now on
        changes["cohort_key"] = None
    if one.cohort_most is not None:
        changes["cohort_most"] = one.cohort_most
    if changes:
        session.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**changes))
    if one.micro_batch is not None:
        set_micro_batch(session, job_id, one.micro_batch)
    log_warnings(db, session, one.claim.job, event_seq, one.warnings)
    return _end_attempt(
        db,
        session,
        load_job(session, job_id),
        crash=one.crash,
        external_cause=one.external_cause,
        pause_reason=one.pause_reason,
        interrupted=one.interrupted,
        now=now,
    )


def release(
    db: Database,
    claim: Claim,
    *,
    crash: str | None = None,
    external_cause: str | None = None,
    pause_reason: str | None = None,
) -> Job:
    """`release_jobs` of one job. Raises LeaseLost."""
    return only(release_jobs(db, [Release(claim, crash, external_cause, pause_reason)]))


# By users: cancelling, pausing, resuming, deleting a job or all jobs of a sweep


@dataclass(frozen=True)
class _Request:
    """What a user asks of jobs, decided by the status that each has at that moment."""

    action: str
    """Name in the audit, after `job.` or `sweep.`."""

    code: str
    """Code of the refusal."""

    applies: sa.ColumnElement[bool]
    """Where there is something to do."""

    changes_now: sa.ColumnElement[bool]
    """Where the status changes at once, which takes an event number; elsewhere the job's worker fulfils it."""

    becomes: Status
    """The status to which it changes."""

    fulfilled_in: tuple[Status, ...]
    """The statuses of jobs to which nothing needs to be done: repeating a request is harmless."""

    values: Mapping[str, Any]


_WAITS = jobs.c.status.in_(("queued", "paused"))
_PAUSED = jobs.c.status == "paused"


def _cancelling(db: Database) -> _Request:
    values = {
        "finished_at": sa.case((_WAITS, db.now), else_=jobs.c.finished_at),
        "cancel_requested_at": sa.func.coalesce(jobs.c.cancel_requested_at, db.now),
        "status_reason": None,
    }
    return _Request("cancel", "not_cancellable", _WAITS | RUNNING, _WAITS, "cancelled", ("cancelled",), values)


def _pausing(db: Database) -> _Request:
    asked = sa.func.coalesce(jobs.c.pause_requested_at, db.now)
    values = {
        "status_reason": sa.case((QUEUED, "paused on request"), else_=jobs.c.status_reason),
        "pause_requested_at": sa.case((RUNNING, asked), else_=jobs.c.pause_requested_at),
    }
    return _Request("pause", "not_pausable", QUEUED | RUNNING, QUEUED, "paused", ("paused",), values)


def _resuming(db: Database) -> _Request:
    applies = _PAUSED | (RUNNING & jobs.c.pause_requested_at.is_not(None))
    values = {"status_reason": None, "pause_requested_at": None}
    return _Request("resume", "not_resumable", applies, _PAUSED, "queued", ("queued", "running"), values)


def request_cancel(db: Database, job_id: str) -> Job:
    """From queued or paused to cancelled; of a running job, a request to its worker. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_cancellable`.
    """
    return _request_of_job(db, job_id, _cancelling(db))


def request_pause(db: Database, job_id: str) -> Job:
    """From queued to paused; of a running job, a request to its worker. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_pausable`.
    """
    return _request_of_job(db, job_id, _pausing(db))


def resume(db: Database, job_id: str) -> Job:
    """From paused to queued; of a running job, a pause request is withdrawn. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_resumable`.
    """
    return _request_of_job(db, job_id, _resuming(db))


def request_cancel_sweep(db: Database, sweep_id: str) -> None:
    """`request_cancel` of every job of a sweep that has not ended, in one transaction.

    Raises NotFound `sweep_not_found`, Conflict `not_cancellable` where all jobs have ended and none was cancelled.
    """
    _request_of_sweep(db, sweep_id, _cancelling(db))


def request_pause_sweep(db: Database, sweep_id: str) -> None:
    """`request_pause` of every job of a sweep that is queued or running, in one transaction.

    Raises NotFound `sweep_not_found`, Conflict `not_pausable` where all jobs have ended.
    """
    _request_of_sweep(db, sweep_id, _pausing(db))


def resume_sweep(db: Database, sweep_id: str) -> None:
    """`resume` of every job of a sweep that is paused or asked to pause, in one transaction.

    Raises NotFound `sweep_not_found`, Conflict `not_resumable` where all jobs have ended.
    """
    _request_of_sweep(db, sweep_id, _resuming(db))


def _request_of_job(db: Database, job_id: str, request: _Request) -> Job:
    with db.write() as session:
        changed = _apply(db, session, (jobs.c.id == job_id) & visible_jobs(session), request)
        if changed:
            audit.record(db, session, f"job.{request.action}", job_id)
            return changed[0]
        job = load_job(session, job_id)
        if job.status not in request.fulfilled_in:
            raise Conflict(request.code, f"job {job_id} is {job.status}")
        return job


def _request_of_sweep(db: Database, sweep_id: str, request: _Request) -> None:
    with db.write() as session:
        found = _lock_jobs_of_sweep(session, sweep_id)
        changed = _apply(db, session, jobs.c.sweep_id == sweep_id, request)
        if changed:
            audit.record(db, session, f"sweep.{request.action}", sweep_id)
        statuses = {row.status for row in found}
        if not changed and not statuses & set(request.fulfilled_in):
            raise Conflict(request.code, f"the jobs of sweep {sweep_id} are {' or '.join(sorted(statuses))}")


def _lock_jobs_of_sweep(session: Session, sweep_id: str) -> Sequence[sa.Row[Any]]:
    """The id, status and text of each job of a sweep in the order of submission, their rows locked in the order of
    their ids, in which everybody locks them.

    Raises NotFound `sweep_not_found`.
    """
    load_sweep(session, sweep_id)
    members = sa.select(jobs.c.id, jobs.c.seq, jobs.c.status, jobs.c.text_sha256).where(jobs.c.sweep_id == sweep_id)
    found = session.execute(members.order_by(jobs.c.id).with_for_update()).all()
    if not found:  # a sweep has a job, or it is gone
        raise NotFound("sweep_not_found", f"there is no sweep {sweep_id!r}")
    return sorted(found, key=lambda row: row.seq)


def _apply(db: Database, session: Session, which: sa.ColumnElement[bool], request: _Request) -> Sequence[Job]:
    """The one UPDATE of a request, with the events of the jobs whose status it changed. Returns all that it changed."""
    statement = (
        sa.update(Job)
        .where(which, request.applies)
        .values(
            status=sa.case((request.changes_now, request.becomes), else_=jobs.c.status),
            event_seq=jobs.c.event_seq + sa.case((request.changes_now, 1), else_=0),
            **request.values,
        )
        .returning(Job)
    )
    changed = sorted(session.scalars(statement, execution_options=_AS_READ).all(), key=lambda job: job.seq)
    ended = [job for job in changed if job.status == request.becomes]
    if request.becomes in TERMINAL:
        _forget_snapshots(session, [job.id for job in ended])
    log_statuses(db, session, ended)
    return changed


def delete(db: Database, job_id: str) -> Job:
    """From a terminal status to nothing: the rows, and the text if no other job has it. The files are the caller's.

    A sweep goes with its last job. Raises NotFound `job_not_found`, Conflict `job_not_finished`, `has_dependents`.
    """
    with db.write() as session:
        # Rows are locked before they are counted: a submit that starts from this job, or has its text, waits or is
        # waited for.
        held = sa.select(Job).where(jobs.c.id == job_id, visible_jobs(session)).with_for_update()
        job = session.scalars(held).one_or_none()
        if job is None:
            raise NotFound("job_not_found", f"there is no job {job_id!r}")
        if job.status not in TERMINAL:
            raise Conflict("job_not_finished", f"job {job_id} is {job.status}: cancel it first")
        session.expunge(job)
        _delete_jobs(session, jobs.c.id == job_id, [job.text_sha256], job.sweep_id)
        audit.record(db, session, "job.delete", job_id)
        return job


def delete_sweep(db: Database, sweep_id: str) -> list[str]:
    """From terminal statuses to nothing: the sweep with all of its jobs, and the texts that no other job has. Returns
    the ids of the jobs, whose files are the caller's.

    Raises NotFound `sweep_not_found`, Conflict `sweep_not_finished`, `has_dependents`.
    """
    with db.write() as session:
        found = _lock_jobs_of_sweep(session, sweep_id)
        unfinished = sum(row.status not in TERMINAL for row in found)
        if unfinished:
            detail = f"{unfinished:,} of the {len(found):,} jobs of sweep {sweep_id} have not ended: cancel it first"
            raise Conflict("sweep_not_finished", detail)
        _delete_jobs(session, jobs.c.sweep_id == sweep_id, {row.text_sha256 for row in found}, sweep_id)
        audit.record(db, session, "sweep.delete", sweep_id)
        return [row.id for row in found]


def _delete_jobs(
    session: Session, which: sa.ColumnElement[bool], texts_of_them: Iterable[str], sweep_id: str | None
) -> None:
    """Delete jobs that have ended, and whose rows are locked; all of one sweep, or of none."""
    chosen = sa.select(jobs.c.id).where(which)
    child = session.execute(
        sa.select(jobs.c.id, jobs.c.parent_id, jobs.c.owner)
        .where(jobs.c.parent_id.in_(chosen), ~jobs.c.id.in_(chosen))
        .limit(1)
    ).one_or_none()
    if child is not None:
        whose = f"job {child.id}" if is_visible(session, child) else "another owner's job"
        raise Conflict(
            "has_dependents", f"{whose} started from a checkpoint of job {child.parent_id}: delete that first"
        )
    held = sa.select(texts.c.sha256).where(texts.c.sha256.in_(sorted(texts_of_them))).order_by(texts.c.sha256)
    locked = session.scalars(held.with_for_update()).all()
    if sweep_id is not None:  # before its jobs are counted: others that delete of it wait
        session.execute(sa.select(sweeps.c.id).where(sweeps.c.id == sweep_id).with_for_update())
    session.execute(sa.delete(jobs).where(which))
    used = sa.exists().where(jobs.c.text_sha256 == texts.c.sha256)
    session.execute(sa.delete(texts).where(texts.c.sha256.in_(locked), ~used))
    if sweep_id is not None:
        has_jobs = sa.exists().where(jobs.c.sweep_id == sweeps.c.id)
        session.execute(sa.delete(sweeps).where(sweeps.c.id == sweep_id, ~has_jobs))


# By anybody: rescuing jobs whose worker is gone


def rescue(db: Database) -> list[Job]:
    """From running, with a lease that has passed, to cancelled, failed, paused or queued. Anybody may call it, at any
    time, several at once. Returns the jobs that it moved.

    A lease more than two lengths ahead was made by a clock that has been set back: it has passed. A crash is counted
    only when the worker boot that held the lease is gone as well.
    """
    length = sa.cast(jobs.c.lease_seconds * 1_000_000, sa.BigInteger)
    until = sa.type_coerce(jobs.c.lease_until, sa.BigInteger)
    now = sa.type_coerce(db.now, sa.BigInteger)
    passed = RUNNING & ((until < now) | (until > now + 2 * length))
    with db.read() as session:
        if session.scalar(sa.select(jobs.c.id).where(passed).limit(1)) is None:
            return []
    with db.write() as session:
        held = sa.select(Job).where(passed).order_by(jobs.c.id).with_for_update(skip_locked=True)
        found = session.scalars(held).all()
        seen = session.scalars(sa.select(db.now)).one()
        # One moment for all of them: the members of a cohort wait equally long, and are claimed together again.
        return [_end_attempt(db, session, job, crash=_who_is_gone(session, job, seen), now=seen) for job in found]


def _who_is_gone(session: Session, job: Job, now: datetime) -> str | None:
    worker = session.get(Worker, job.worker_id)
    return f"worker {job.worker_id} is gone" if worker is None or is_gone(worker, now) else None


def _end_attempt(
    db: Database,
    session: Session,
    job: Job,
    *,
    crash: str | None = None,
    external_cause: str | None = None,
    pause_reason: str | None = None,
    interrupted: str = _INTERRUPTED,
    now: datetime | None = None,
) -> Job:
    """From running to the status that an unfinished attempt leads to, whether its worker releases the job or a rescuer
    does. `interrupted`: the status reason of a job that waits for nothing but a worker. `now`: from when on a job waits
    after a crash, the database's time by default."""
    crashes = job.crashes + (crash is not None)
    if job.cancel_requested_at is not None:
        return _end_running(db, session, job.id, "cancelled", crashes=crashes)
    if crash is not None and crashes >= MAX_CRASHES:
        message = f"ended abnormally {crashes} times since the last checkpoint; the last time: {crash}"
        error = {"code": "crashed_repeatedly", "message": message}
        return _end_running(db, session, job.id, "failed", crashes=crashes, error=error)
    if pause_reason is not None or job.pause_requested_at is not None:
        reason = pause_reason or "paused on request"
        return _end_running(
            db, session, job.id, "paused", crashes=crashes, status_reason=reason, pause_requested_at=None
        )  # fmt: skip
    if crash is not None:
        wait = min(BACKOFF * 2 ** (crashes - 1), MAX_BACKOFF).total_seconds()
        reason = f"waits {wait:g} s after a crash: {crash}"
    elif external_cause is not None:
        wait = BACKOFF.total_seconds()
        reason = f"waits {wait:g} s after an error outside of the job: {external_cause}"
    else:
        return _end_running(db, session, job.id, "queued", status_reason=interrupted)
    waits = {"waits_since": db.now if now is None else now, "waits_seconds": wait}
    return _end_running(db, session, job.id, "queued", crashes=crashes, status_reason=reason, **waits)


def _end_running(db: Database, session: Session, job_id: str, status: Status, **values: Any) -> Job:
    """From running to `status`. The caller has locked the row, and made sure that it is running."""
    statement = (
        sa.update(Job)
        .where(jobs.c.id == job_id, RUNNING)
        .values(
            status=status,
            lease_until=None,
            lease_seconds=None,
            finished_at=db.now if status in TERMINAL else None,
            event_seq=jobs.c.event_seq + 1,
            **{"status_reason": None, **values},
        )
        .returning(Job)
    )
    job = session.scalars(statement, execution_options=_AS_READ).one()
    end_attempts(db, session, [job])
    if status in TERMINAL:
        _forget_snapshots(session, [job_id])
    log_status(db, session, job)
    return job


def _forget_snapshots(session: Session, job_ids: Sequence[str]) -> None:
    """Delete the snapshots' rows of jobs that have ended: they are never resumed, and files without a row are swept."""
    snapshots = table(Snapshot)
    session.execute(sa.delete(snapshots).where(snapshots.c.job_id.in_(job_ids)))
