"""The job queue: every transition of a job's status, each one short transaction. No other file changes a status.

    queued -> running -> succeeded | failed | cancelled        queued -> paused | cancelled
    running -> queued (lease lost, drained, crashed,           running -> paused
                       out of memory)
    paused -> queued | cancelled                               terminal is terminal

A claim raises the job's fence, and every later write of the worker that claimed it begins by checking that fence in
the same transaction (`lease.py`): a worker that was slow, stopped or cut off writes nothing once another has claimed
the job. To cancel or pause a running job is a request that its worker reads with its next write; a job that no worker
runs changes its status at once. Knows no HTTP and no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.database.schema import REVISION, alembic_version, table
from service.database.upsert import insert_unless_there
from service.errors import Conflict, Invalid, NotFound, SchemaMismatch, TooManyRequests
from service.jobs.claim_order import CLAIM_ORDER, QUEUED, RUNNING, claimable, jobs
from service.jobs.events import log_status, log_warnings
from service.jobs.ids import new_id
from service.jobs.lease import Claim, renew_lease
from service.jobs.new_job import NewJob
from service.jobs.reads import load_job
from service.jobs.recording import set_micro_batch
from service.jobs.statuses import TERMINAL, Status
from service.jobs.tables import Counter, Job, Snapshot, Text, Worker
from service.jobs.workers import WorkerIdentity, is_gone

MAX_CRASHES = 3
"""Abnormal ends since the last new checkpoint after which a job fails for good."""

BACKOFF = timedelta(seconds=15)
"""How long a job waits after its first crash, doubled by each further one."""

MAX_BACKOFF = timedelta(minutes=15)
"""The longest wait after a crash."""

texts = table(Text)

_AS_READ = {"synchronize_session": False, "populate_existing": True}
"""The row that RETURNING gives is the truth, whatever the session has read before."""


# Submitting


def submit(db: Database, new: NewJob, *, max_queued: int | None = None) -> tuple[Job, bool]:
    """From nothing to queued. Returns the job, and whether it is new or the one its idempotency key already made.

    Raises Invalid `idempotency_key_reused`, NotFound `job_not_found` (the parent), TooManyRequests `queue_full`.
    """
    content = new.text.encode()
    sha256 = hashlib.sha256(content).hexdigest()
    with db.write() as session:
        if (job := _find_by_key(session, new, sha256)) is not None:
            return job, False
        if max_queued is not None and _count_queued(session, max_queued) >= max_queued:
            raise TooManyRequests("queue_full", f"{max_queued} jobs are waiting already", retry_after=60)
        if new.parent_id is not None:
            _lock_parent(session, new.parent_id)
        _lock_text(db, session, sha256, content)
        values = {
            "id": new_id(),
            "seq": _next_seq(session),
            "owner": new.owner,
            "name": new.name,
            "tags": dict(new.tags),
            "status": "queued",
            "priority": new.priority,
            "run_at": new.run_at,
            "created_at": db.now,
            "fence": 0,
            "attempt": 0,
            "crashes": 0,
            "config": dict(new.config),
            "progress": {},
            "text_sha256": sha256,
            "text_n_bytes": len(content),
            "n_tokens": new.n_tokens,
            "total_steps": new.total_steps,
            "n_params": new.n_params,
            "n_active_params": new.n_active_params,
            "training_bytes": new.training_bytes,
            "warnings": list(new.warnings),
            "parent_id": new.parent_id,
            "parent_percent": new.parent_percent,
            "idempotency_key": new.idempotency_key,
            "request_sha256": _request_sha256(new, sha256),
            "event_seq": 1,
        }
        job = session.scalars(
            insert_unless_there(session, Job).values(**values).returning(Job)
        ).one_or_none()  # fmt: skip
        if job is None:  # a submit with the same key has committed since we looked
            job = _find_by_key(session, new, sha256)
            assert job is not None
            return job, False
        log_status(db, session, job)
        return job, True


def _find_by_key(session: Session, new: NewJob, sha256: str) -> Job | None:
    if new.idempotency_key is None:
        return None
    same_key = (jobs.c.owner == new.owner) & (jobs.c.idempotency_key == new.idempotency_key)
    job = session.scalars(sa.select(Job).where(same_key)).one_or_none()
    if job is not None and job.request_sha256 != _request_sha256(new, sha256):
        raise Invalid(
            "idempotency_key_reused",
            f"the key {new.idempotency_key!r} was used for job {job.id}, whose text, config, name or tags differ",
        )
    return job


def _request_sha256(new: NewJob, text_sha256: str) -> str:
    request = [text_sha256, new.config, new.name, new.tags, new.priority, new.parent_id, new.parent_percent]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _count_queued(session: Session, most: int) -> int:
    some = sa.select(jobs.c.id).where(QUEUED).limit(most).subquery()
    return session.scalars(sa.select(sa.func.count()).select_from(some)).one()


def _lock_parent(session: Session, parent_id: str) -> None:
    """Lock the parent against deletion until this transaction ends (PostgreSQL; SQLite has one writer)."""
    held = sa.select(jobs.c.id).where(jobs.c.id == parent_id).with_for_update(read=True, key_share=True)
    if session.scalar(held) is None:
        raise NotFound("job_not_found", f"there is no job {parent_id!r} to start from")


def _lock_text(db: Database, session: Session, sha256: str, content: bytes) -> None:
    """Store the text unless it is there, and lock it against deletion until this transaction ends."""
    held = sa.select(texts.c.sha256).where(texts.c.sha256 == sha256).with_for_update(read=True, key_share=True)
    while session.scalar(held) is None:
        values = {"sha256": sha256, "n_bytes": len(content), "content": content, "created_at": db.now}
        session.execute(insert_unless_there(session, Text).values(**values))


def _next_seq(session: Session) -> int:
    """The next job's place in the order of submission. Other submits wait here for this one's commit, so this comes
    after all that may take time."""
    counters = table(Counter)
    raised = sa.update(counters).where(counters.c.name == "jobs").values(value=counters.c.value + 1)
    seq: int = session.scalars(raised.returning(counters.c.value)).one()
    return seq


# By the worker: claiming a job and ending an attempt


def claim(db: Database, worker: WorkerIdentity, lease_seconds: float) -> Claim | None:
    """From queued to running: the first claimable job that fits the worker's memory, or None.

    Raises SchemaMismatch when the database has moved to another revision: the worker must drain.
    """
    fits = claimable(db.now)
    if worker.memory_bytes is not None:
        fits &= jobs.c.training_bytes.is_(None) | (jobs.c.training_bytes <= worker.memory_bytes)
    first = sa.select(jobs.c.id).where(fits).order_by(*CLAIM_ORDER).limit(1)
    # Look before locking: an idle worker that was woken for nothing takes no write lock and wakes nobody else.
    with db.read() as session:
        looked = sa.select(alembic_version.c.version_num, first.scalar_subquery().label("first"))
        found = session.execute(looked).one_or_none()
        revision = None if found is None else found.version_num
        if revision != REVISION:
            raise SchemaMismatch(revision, REVISION)
        if found is None or found.first is None:
            return None
    statement = (
        sa.update(Job)
        .where(
            # Not IN: a scalar subquery runs once, and so locks one row, whatever the planner does.
            jobs.c.id == first.with_for_update(skip_locked=True).scalar_subquery(),
            QUEUED,
            sa.exists().where(alembic_version.c.version_num == REVISION),
        )
        .values(
            status="running",
            status_reason=None,
            waits_since=None,
            waits_seconds=None,
            fence=jobs.c.fence + 1,
            attempt=jobs.c.attempt + 1,
            worker_id=worker.id,
            lease_until=db.after(lease_seconds),
            lease_seconds=lease_seconds,
            started_at=sa.func.coalesce(jobs.c.started_at, db.now),
            event_seq=jobs.c.event_seq + 1,
        )
        .returning(Job)
    )
    with db.write() as session:
        job = session.scalars(statement, execution_options=_AS_READ).one_or_none()
        if job is None:
            return None
        log_status(db, session, job)
    return Claim(job, lease_seconds)


def finish(
    db: Database,
    claim: Claim,
    status: Literal["succeeded", "failed"],
    *,
    error: Mapping[str, Any] | None = None,
    reason: str | None = None,
    progress: Mapping[str, Any] | None = None,
) -> Job:
    """From running to succeeded or failed; to cancelled when that was requested before.

    `error`: `{"code", "message"}`, with failed and only then. `reason`: why it succeeded before its last step, where it
    did. Raises LeaseLost.
    """
    assert (status == "failed") == (error is not None)
    with db.write() as session:
        renewed = renew_lease(db, session, claim, progress=progress)
        if renewed.intents.cancel:
            return _end_running(db, session, claim.job_id, "cancelled")
        error = None if error is None else dict(error)
        return _end_running(db, session, claim.job_id, status, error=error, status_reason=reason)


def release(
    db: Database,
    claim: Claim,
    *,
    crash: str | None = None,
    external_cause: str | None = None,
    pause_reason: str | None = None,
) -> Job:
    """From running to queued, when a worker drains, when its trainer ended abnormally, or after an error outside of the
    job; to failed, when the job crashed too often; to paused, when that is still requested, or the worker has a reason
    of its own; to cancelled, when that is requested. The trainer must be dead.

    `crash`: how the trainer ended abnormally. `external_cause`: the error outside of the job; the job waits, and no
    crash is counted. `pause_reason`: the worker's reason, such as a full disk. Raises LeaseLost.
    """
    with db.write() as session:
        renew_lease(db, session, claim)
        job = load_job(session, claim.job_id)
        return _end_attempt(db, session, job, crash=crash, external_cause=external_cause, pause_reason=pause_reason)


def release_out_of_memory(
    db: Database, claim: Claim, *, micro_batch: int, reason: str, warnings: Sequence[Mapping[str, str]]
) -> Job:
    """From running to queued, when the system killed the trainer because memory ran out, with a smaller micro-batch for
    the next attempt; to paused or cancelled, when that is requested. The trainer must be dead.

    No crash is counted: a micro-batch can be halved only so often. `reason`: the status reason of a queued job.
    `warnings`: `{"code", "message"}` each. Raises LeaseLost.
    """
    with db.write() as session:
        renewed = renew_lease(db, session, claim, n_events=len(warnings))
        set_micro_batch(session, claim.job_id, micro_batch)
        log_warnings(db, session, claim.job_id, renewed.event_seq, warnings)
        return _end_attempt(db, session, load_job(session, claim.job_id), interrupted=reason)


# By users: cancelling, pausing, resuming, deleting


def request_cancel(db: Database, job_id: str) -> Job:
    """From queued or paused to cancelled; of a running job, a request to its worker. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_cancellable`.
    """
    waits = jobs.c.status.in_(("queued", "paused"))
    with db.write() as session:
        job = _request(
            session,
            job_id,
            waits | RUNNING,
            waits,
            status=sa.case((waits, "cancelled"), else_=jobs.c.status),
            finished_at=sa.case((waits, db.now), else_=jobs.c.finished_at),
            cancel_requested_at=sa.func.coalesce(jobs.c.cancel_requested_at, db.now),
            status_reason=None,
        )
        if job is None:
            return _unchanged(session, job_id, ("cancelled",), "not_cancellable")
        if job.status == "cancelled":
            _forget_snapshot(session, job_id)
            log_status(db, session, job)
        return job


def request_pause(db: Database, job_id: str) -> Job:
    """From queued to paused; of a running job, a request to its worker. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_pausable`.
    """
    with db.write() as session:
        job = _request(
            session,
            job_id,
            QUEUED | RUNNING,
            QUEUED,
            status=sa.case((QUEUED, "paused"), else_=jobs.c.status),
            status_reason=sa.case((QUEUED, "paused on request"), else_=jobs.c.status_reason),
            pause_requested_at=sa.case(
                (RUNNING, sa.func.coalesce(jobs.c.pause_requested_at, db.now)), else_=jobs.c.pause_requested_at
            ),
        )
        if job is None:
            return _unchanged(session, job_id, ("paused",), "not_pausable")
        if job.status == "paused":
            log_status(db, session, job)
        return job


def resume(db: Database, job_id: str) -> Job:
    """From paused to queued; of a running job, a pause request is withdrawn. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_resumable`.
    """
    paused = jobs.c.status == "paused"
    with db.write() as session:
        job = _request(
            session,
            job_id,
            paused | (RUNNING & jobs.c.pause_requested_at.is_not(None)),
            paused,
            status=sa.case((paused, "queued"), else_=jobs.c.status),
            status_reason=None,
            pause_requested_at=None,
        )
        if job is None:
            return _unchanged(session, job_id, ("queued", "running"), "not_resumable")
        if job.status == "queued":
            log_status(db, session, job)
        return job


def _request(
    session: Session,
    job_id: str,
    possible: sa.ColumnElement[bool],
    changes_now: sa.ColumnElement[bool],
    **values: Any,
) -> Job | None:
    """The one UPDATE of a request, decided by the job's status at that moment. `possible`: where the request applies;
    elsewhere nothing changes and None is returned. `changes_now`: where the status changes, which takes an event
    number."""
    statement = (
        sa.update(Job)
        .where(jobs.c.id == job_id, possible)
        .values(**values, event_seq=jobs.c.event_seq + sa.case((changes_now, 1), else_=0))
        .returning(Job)
    )
    return session.scalars(statement, execution_options=_AS_READ).one_or_none()


def _unchanged(session: Session, job_id: str, fulfilled_in: tuple[str, ...], code: str) -> Job:
    """The job that a request did not change, because its status is one of `fulfilled_in`. Raises Conflict `code` for
    any other status."""
    job = load_job(session, job_id)
    if job.status not in fulfilled_in:
        raise Conflict(code, f"job {job_id} is {job.status}")
    return job


def delete(db: Database, job_id: str) -> Job:
    """From a terminal status to nothing: the rows, and the text if no other job has it. The files are the caller's.

    Raises NotFound `job_not_found`, Conflict `job_not_finished`, `has_dependents`.
    """
    with db.write() as session:
        # Rows are locked before they are counted: a submit that starts from this job, or has its text, waits or is
        # waited for.
        job = session.scalars(sa.select(Job).where(jobs.c.id == job_id).with_for_update()).one_or_none()
        if job is None:
            raise NotFound("job_not_found", f"there is no job {job_id!r}")
        if job.status not in TERMINAL:
            raise Conflict("job_not_finished", f"job {job_id} is {job.status}: cancel it first")
        child = session.scalar(sa.select(jobs.c.id).where(jobs.c.parent_id == job_id).limit(1))
        if child is not None:
            raise Conflict(
                "has_dependents", f"job {child} started from a checkpoint of job {job_id}: delete that first"
            )
        session.execute(sa.select(texts.c.sha256).where(texts.c.sha256 == job.text_sha256).with_for_update())
        session.expunge(job)
        session.execute(sa.delete(jobs).where(jobs.c.id == job_id))
        used = sa.exists().where(jobs.c.text_sha256 == texts.c.sha256)
        session.execute(sa.delete(texts).where(texts.c.sha256 == job.text_sha256, ~used))
        return job


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
        held = sa.select(Job).where(passed).order_by(jobs.c.seq).with_for_update(skip_locked=True)
        found = session.scalars(held).all()
        seen = session.scalars(sa.select(db.now)).one()
        return [_end_attempt(db, session, job, crash=_who_is_gone(session, job, seen)) for job in found]


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
    interrupted: str = "interrupted; continues when a worker is free",
) -> Job:
    """From running to the status that an unfinished attempt leads to, whether its worker releases the job or a rescuer
    does. `interrupted`: the status reason of a job that waits for nothing but a worker."""
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
    waits = {"waits_since": db.now, "waits_seconds": wait}
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
    if status in TERMINAL:
        _forget_snapshot(session, job_id)
    log_status(db, session, job)
    return job


def _forget_snapshot(session: Session, job_id: str) -> None:
    """Delete the snapshot's row of a job that has ended: it is never resumed, and files without a row are swept."""
    snapshots = table(Snapshot)
    session.execute(sa.delete(snapshots).where(snapshots.c.job_id == job_id))
