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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database
from service.database.schema import REVISION, alembic_version, table
from service.database.upsert import insert_unless_there
from service.errors import Conflict, Invalid, NotFound, SchemaMismatch, TooManyRequests
from service.jobs.claim_order import CLAIM_ORDER, QUEUED, RUNNING, claimable, jobs
from service.jobs.events import Submitted, log_status, log_statuses, log_warnings
from service.jobs.ids import new_id
from service.jobs.lease import Claim, renew_lease
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.reads import load_job
from service.jobs.recording import set_micro_batch
from service.jobs.statuses import TERMINAL, Status
from service.jobs.tables import Counter, Job, Snapshot, Sweep, Text, Worker
from service.jobs.workers import WorkerIdentity, is_gone

MAX_CRASHES = 3
"""Abnormal ends since the last new checkpoint after which a job fails for good."""

BACKOFF = timedelta(seconds=15)
"""How long a job waits after its first crash, doubled by each further one."""

MAX_BACKOFF = timedelta(minutes=15)
"""The longest wait after a crash."""

SWEEP_TAG = "sweep"
"""The tag by which the jobs of a sweep are found in lists; its value is the sweep's id."""

texts = table(Text)
sweeps = table(Sweep)

_AS_READ = {"synchronize_session": False, "populate_existing": True}
"""The row that RETURNING gives is the truth, whatever the session has read before."""


# Submitting


def submit(db: Database, new: NewJob, *, max_queued: int | None = None) -> tuple[Job, bool]:
    """From nothing to queued. Returns the job, and whether it is new or the one its idempotency key already made.

    Raises Invalid `idempotency_key_reused`, NotFound `job_not_found` (the parent), TooManyRequests `queue_full`.
    """
    text = new.text.encode()
    sha256 = hashlib.sha256(text).hexdigest()
    request_sha256 = _request_sha256(_identity(new, sha256))
    with db.write() as session:
        if (job := _find_job_by_key(session, new, request_sha256)) is not None:
            return job, False
        _refuse_if_full(session, 1, max_queued)
        if new.parent_id is not None:
            _lock_parent(session, new.parent_id)
        _lock_text(db, session, sha256, text)
        values = _queued(new, _next_seq(session), sha256, len(text)) | {"request_sha256": request_sha256}
        insert = insert_unless_there(session, Job).values(**values, created_at=db.now)
        job = session.scalars(insert.returning(Job)).one_or_none()
        if job is None:  # a submit with the same key has committed since we looked
            job = _find_job_by_key(session, new, request_sha256)
            assert job is not None
            return job, False
        log_status(db, session, job)
        return job, True


def submit_sweep(db: Database, new: NewSweep, *, max_queued: int | None = None) -> tuple[Sweep, bool]:
    """From nothing to queued, all jobs of a sweep or none. Returns the sweep, and whether it is new or the one its
    idempotency key already made.

    Raises Invalid `idempotency_key_reused`, NotFound `job_not_found` (a parent), TooManyRequests `queue_full`.
    """
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in {job.text for job in new.jobs}}
    request_sha256 = _request_sha256(
        [new.name, new.tags, *(_identity(job, digests[job.text]) for job in new.jobs)]
    )  # fmt: skip
    with db.write() as session:
        if (sweep := _find_sweep_by_key(session, new, request_sha256)) is not None:
            return sweep, False
        _refuse_if_full(session, len(new.jobs), max_queued)
        for parent_id in sorted({job.parent_id for job in new.jobs if job.parent_id is not None}):
            _lock_parent(session, parent_id)
        n_bytes = {}
        for text, sha256 in sorted(digests.items(), key=lambda found: found[1]):
            content = text.encode()
            n_bytes[text] = len(content)
            _lock_text(db, session, sha256, content)
        first = _next_seq(session, len(new.jobs)) - len(new.jobs) + 1
        values = {
            "id": new_id(),
            "seq": first,
            "owner": new.owner,
            "name": new.name,
            "tags": dict(new.tags),
            "created_at": db.now,
            "config": dict(new.config),
            "parameters": [dict(parameter) for parameter in new.parameters],
            "idempotency_key": new.idempotency_key,
            "request_sha256": request_sha256,
            "event_seq": 0,
        }
        insert = insert_unless_there(session, Sweep).values(**values)
        sweep = session.scalars(insert.returning(Sweep)).one_or_none()
        if sweep is None:  # a submit with the same key has committed since we looked
            sweep = _find_sweep_by_key(session, new, request_sha256)
            assert sweep is not None
            return sweep, False
        member = {"sweep_id": sweep.id}
        rows = [
            _queued(job, seq, digests[job.text], n_bytes[job.text])
            | member
            | {"tags": {**job.tags, SWEEP_TAG: sweep.id}, "request_sha256": None}
            for seq, job in enumerate(new.jobs, first)
        ]
        session.execute(sa.insert(jobs).values(created_at=db.now), rows)
        log_statuses(db, session, [Submitted(row["id"], sweep.id) for row in rows])
        session.refresh(sweep)
        return sweep, True


def _queued(new: NewJob, seq: int, text_sha256: str, text_n_bytes: int) -> dict[str, Any]:
    """The row of a new job, but for the time."""
    return {
        "id": new_id(),
        "seq": seq,
        "owner": new.owner,
        "name": new.name,
        "tags": dict(new.tags),
        "status": "queued",
        "priority": new.priority,
        "run_at": new.run_at,
        "fence": 0,
        "attempt": 0,
        "crashes": 0,
        "config": dict(new.config),
        "progress": {},
        "text_sha256": text_sha256,
        "text_n_bytes": text_n_bytes,
        "n_tokens": new.n_tokens,
        "total_steps": new.total_steps,
        "n_params": new.n_params,
        "n_active_params": new.n_active_params,
        "training_bytes": new.training_bytes,
        "warnings": list(new.warnings),
        "parent_id": new.parent_id,
        "parent_percent": new.parent_percent,
        "idempotency_key": new.idempotency_key,
        "event_seq": 1,
    }


def _find_job_by_key(session: Session, new: NewJob, request_sha256: str) -> Job | None:
    if new.idempotency_key is None:
        return None
    same_key = (jobs.c.owner == new.owner) & (jobs.c.idempotency_key == new.idempotency_key)
    job = session.scalars(sa.select(Job).where(same_key)).one_or_none()
    if job is not None and job.request_sha256 != request_sha256:
        raise Invalid(
            "idempotency_key_reused",
            f"the key {new.idempotency_key!r} was used for job {job.id}, whose text, config, name or tags differ",
        )
    return job


def _find_sweep_by_key(session: Session, new: NewSweep, request_sha256: str) -> Sweep | None:
    if new.idempotency_key is None:
        return None
    same_key = (sweeps.c.owner == new.owner) & (sweeps.c.idempotency_key == new.idempotency_key)
    sweep = session.scalars(sa.select(Sweep).where(same_key)).one_or_none()
    if sweep is not None and sweep.request_sha256 != request_sha256:
        raise Invalid(
            "idempotency_key_reused",
            f"the key {new.idempotency_key!r} was used for sweep {sweep.id}, whose jobs, name or tags differ",
        )
    return sweep


def _identity(new: NewJob, text_sha256: str) -> list[Any]:
    """What two requests with the same idempotency key must have in common."""
    return [text_sha256, new.config, new.name, new.tags, new.priority, new.parent_id, new.parent_percent]


def _request_sha256(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _refuse_if_full(session: Session, n_new: int, max_queued: int | None) -> None:
    if max_queued is not None and (waiting := _count_queued(session, max_queued)) + n_new > max_queued:
        detail = f"{waiting:,} jobs are waiting already" + (f", and {n_new:,} are new" if n_new > 1 else "")
        raise TooManyRequests("queue_full", f"{detail}; at most {max_queued:,} may wait", retry_after=60)


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


def _next_seq(session: Session, n: int = 1) -> int:
    """The last of the next `n` places in the order of submission. Other submits wait here for this one's commit, so
    this comes after all that may take time."""
    counters = table(Counter)
    raised = sa.update(counters).where(counters.c.name == "jobs").values(value=counters.c.value + n)
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
        revision = session.scalar(sa.select(alembic_version.c.version_num))
        if revision != REVISION:
            raise SchemaMismatch(revision, REVISION)
        if session.scalar(first) is None:
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
        log_warnings(db, session, claim.job, renewed.event_seq, warnings)
        return _end_attempt(db, session, load_job(session, claim.job_id), interrupted=reason)


# By users: cancelling, pausing, resuming, deleting a job or all jobs of a sweep


@dataclass(frozen=True)
class _Request:
    """What a user asks of jobs, decided by the status that each has at that moment."""

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
    return _Request("not_cancellable", _WAITS | RUNNING, _WAITS, "cancelled", ("cancelled",), values)


def _pausing(db: Database) -> _Request:
    asked = sa.func.coalesce(jobs.c.pause_requested_at, db.now)
    values = {
        "status_reason": sa.case((QUEUED, "paused on request"), else_=jobs.c.status_reason),
        "pause_requested_at": sa.case((RUNNING, asked), else_=jobs.c.pause_requested_at),
    }
    return _Request("not_pausable", QUEUED | RUNNING, QUEUED, "paused", ("paused",), values)


def _resuming(db: Database) -> _Request:
    applies = _PAUSED | (RUNNING & jobs.c.pause_requested_at.is_not(None))
    values = {"status_reason": None, "pause_requested_at": None}
    return _Request("not_resumable", applies, _PAUSED, "queued", ("queued", "running"), values)


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
        changed = _apply(db, session, jobs.c.id == job_id, request)
        if changed:
            return changed[0]
        job = load_job(session, job_id)
        if job.status not in request.fulfilled_in:
            raise Conflict(request.code, f"job {job_id} is {job.status}")
        return job


def _request_of_sweep(db: Database, sweep_id: str, request: _Request) -> None:
    with db.write() as session:
        found = _lock_jobs_of_sweep(session, sweep_id)
        changed = _apply(db, session, jobs.c.sweep_id == sweep_id, request)
        statuses = {row.status for row in found}
        if not changed and not statuses & set(request.fulfilled_in):
            raise Conflict(request.code, f"the jobs of sweep {sweep_id} are {' or '.join(sorted(statuses))}")


def _lock_jobs_of_sweep(session: Session, sweep_id: str) -> Sequence[sa.Row[Any]]:
    """The id, status and text of each job of a sweep, their rows locked, in the order in which everybody locks them.

    Raises NotFound `sweep_not_found`.
    """
    members = sa.select(jobs.c.id, jobs.c.status, jobs.c.text_sha256).where(jobs.c.sweep_id == sweep_id)
    found = session.execute(members.order_by(jobs.c.seq).with_for_update()).all()
    if not found:  # a sweep has a job, or it is gone
        raise NotFound("sweep_not_found", f"there is no sweep {sweep_id!r}")
    return found


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
    if len(ended) == 1:
        log_status(db, session, ended[0])
    else:
        log_statuses(db, session, ended)
    return changed


def delete(db: Database, job_id: str) -> Job:
    """From a terminal status to nothing: the rows, and the text if no other job has it. The files are the caller's.

    A sweep goes with its last job. Raises NotFound `job_not_found`, Conflict `job_not_finished`, `has_dependents`.
    """
    with db.write() as session:
        # Rows are locked before they are counted: a submit that starts from this job, or has its text, waits or is
        # waited for.
        job = session.scalars(sa.select(Job).where(jobs.c.id == job_id).with_for_update()).one_or_none()
        if job is None:
            raise NotFound("job_not_found", f"there is no job {job_id!r}")
        if job.status not in TERMINAL:
            raise Conflict("job_not_finished", f"job {job_id} is {job.status}: cancel it first")
        session.expunge(job)
        _delete_jobs(session, jobs.c.id == job_id, [job.text_sha256], job.sweep_id)
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
        return [row.id for row in found]


def _delete_jobs(
    session: Session, which: sa.ColumnElement[bool], texts_of_them: Iterable[str], sweep_id: str | None
) -> None:
    """Delete jobs that have ended, and whose rows are locked; all of one sweep, or of none."""
    chosen = sa.select(jobs.c.id).where(which)
    child = session.execute(
        sa.select(jobs.c.id, jobs.c.parent_id).where(jobs.c.parent_id.in_(chosen), ~jobs.c.id.in_(chosen)).limit(1)
    ).one_or_none()
    if child is not None:
        raise Conflict(
            "has_dependents", f"job {child.id} started from a checkpoint of job {child.parent_id}: delete that first"
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
        # By sweep, because each one's row is locked in turn (`events.py`).
        held = sa.select(Job).where(passed).order_by(jobs.c.sweep_id, jobs.c.seq).with_for_update(skip_locked=True)
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
        _forget_snapshots(session, [job_id])
    log_status(db, session, job)
    return job


def _forget_snapshots(session: Session, job_ids: Sequence[str]) -> None:
    """Delete the snapshots' rows of jobs that have ended: they are never resumed, and files without a row are swept."""
    snapshots = table(Snapshot)
    session.execute(sa.delete(snapshots).where(snapshots.c.job_id.in_(job_ids)))
