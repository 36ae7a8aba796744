"""The job queue: every transition of a job's status, each one short transaction. No other file changes a status.

    queued -> running -> succeeded | failed | cancelled        queued -> paused | cancelled
    running -> queued (lease lost, drained, crashed,           running -> paused
                       out of memory)
    paused -> queued | cancelled                               terminal is terminal

A claim raises the job's fence, and every later write of its owner begins by checking that fence in the same
transaction: a worker that was slow, stopped or cut off writes nothing once somebody else has taken over. Cancel and
pause are wishes to the owner of a running job; a job that nobody runs obeys at once. Knows no HTTP and no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlmodel import Session

from nanomoe.config_warnings import CODES as CONFIG_WARNING_CODES
from service.database.database import REVISION, Database, alembic_version, insert_or_update, insert_unless_there
from service.errors import Conflict, Invalid, LeaseLost, NotFound, SchemaMismatch, TooManyRequests
from service.jobs.series import Columns, delete_steps_after, write_steps
from service.jobs.store import WorkerIdentity, is_gone, load_job
from service.jobs.tables import (
    TERMINAL,
    Checkpoint,
    Counter,
    Event,
    Job,
    Snapshot,
    Text,
    UtcTime,
    Worker,
    new_id,
    table,
)

MAX_CRASHES = 3
"""Abnormal ends since the last new checkpoint after which a job is given up."""

BACKOFF = timedelta(seconds=15)
"""Wait after the first crash, doubled by each further one."""

MAX_BACKOFF = timedelta(minutes=15)

jobs = table(Job)
texts = table(Text)
QUEUED: sa.ColumnElement[bool] = jobs.c.status == sa.literal("queued", literal_execute=True)
RUNNING: sa.ColumnElement[bool] = jobs.c.status == sa.literal("running", literal_execute=True)
# Written out in the statement, because neither database uses a partial index for a parameter it does not know yet.

_AS_READ = {"synchronize_session": False, "populate_existing": True}
"""The row that RETURNING gives is the truth, whatever the session has read before."""

CLAIM_ORDER = (jobs.c.priority.desc(), jobs.c.seq)
"""Who goes first, whatever the clock says."""


WAIT_ENDS: sa.ColumnElement[datetime] = sa.type_coerce(
    sa.type_coerce(jobs.c.waits_since, sa.BigInteger) + sa.cast(jobs.c.waits_seconds * 1_000_000, sa.BigInteger),
    UtcTime(),
)
"""When a job's back-off is over; null for one without."""


def claimable(moment: sa.ColumnElement[datetime]) -> sa.ColumnElement[bool]:
    """Whether a job is queued, and waits at `moment` for nothing but a worker: neither for the date that its user gave
    nor for the end of a back-off."""
    return (
        QUEUED
        & (jobs.c.run_at.is_(None) | (jobs.c.run_at <= moment))
        # A wait that has not begun yet was written by a clock that has been set back since.
        & (jobs.c.waits_since.is_(None) | (jobs.c.waits_since > moment) | (moment >= WAIT_ENDS))
        & jobs.c.cancel_requested_at.is_(None)
    )


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A checked request, ready to become a row."""

    text: str
    config: Mapping[str, Any]
    """The complete JobConfig, as JSON."""

    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    priority: int = 0
    run_at: datetime | None = None
    """Not to be claimed before; None is as soon as possible."""

    n_tokens: int | None = None
    total_steps: int | None = None
    n_params: int | None = None
    n_active_params: int | None = None
    training_bytes: int | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    parent_id: str | None = None
    parent_percent: int | None = None
    idempotency_key: str | None = None
    """The same key with the same request is the same job, however often it is sent."""


@dataclass(frozen=True)
class Claim:
    """The right to write to a job until its fence moves on."""

    job: Job
    """The row as it was claimed."""

    lease_seconds: float

    @property
    def job_id(self) -> str:
        return self.job.id

    @property
    def fence(self) -> int:
        return self.job.fence


@dataclass(frozen=True)
class Intents:
    """What the owner is asked to do at the next step boundary. Cancel beats pause."""

    cancel: bool
    pause: bool


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
            _hold_parent(session, new.parent_id)
        _hold_text(db, session, sha256, content)
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
        _log_status(db, session, job)
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


def _hold_parent(session: Session, parent_id: str) -> None:
    """Keep the parent from being deleted until this transaction has ended (PostgreSQL; SQLite has one writer)."""
    held = sa.select(jobs.c.id).where(jobs.c.id == parent_id).with_for_update(read=True, key_share=True)
    if session.scalar(held) is None:
        raise NotFound("job_not_found", f"there is no job {parent_id!r} to start from")


def _hold_text(db: Database, session: Session, sha256: str, content: bytes) -> None:
    """Store the text unless it is there, and keep it from being deleted until this transaction has ended."""
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


# The owner of a running job


def claim(db: Database, worker: WorkerIdentity, lease_seconds: float) -> Claim | None:
    """From queued to running: the first job in line that fits the worker, or None.

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
        _log_status(db, session, job)
    return Claim(job, lease_seconds)


def heartbeat(db: Database, claim: Claim, progress: Mapping[str, Any] | None = None) -> Intents:
    """Running stays running: the lease is renewed. Raises LeaseLost."""
    with db.write() as session:
        return _own(db, session, claim, **_progress(progress)).intents


def record_prepared(
    db: Database,
    claim: Claim,
    *,
    execution: Mapping[str, Any],
    n_tokens: int,
    total_steps: int,
    model: Mapping[str, int],
    warnings: Sequence[Mapping[str, Any]] = (),
) -> Intents:
    """Running stays running: what the first start decided. `model`: `{"n_params", "n_active_params"}`. An execution
    that an earlier attempt decided stays. `warnings` of the config take the place of those said before; of any other
    code the first stays. Each that says what the job has not been told yet is an event too. Raises LeaseLost."""
    with db.write() as session:
        owned = _own(
            db,
            session,
            claim,
            n_tokens=n_tokens,
            total_steps=total_steps,
            n_params=model["n_params"],
            n_active_params=model["n_active_params"],
        )
        job = load_job(session, claim.job_id)
        new = [dict(warning) for warning in warnings if warning not in job.warnings]
        # What was said of the config before the text was tokenised, or with another tokenizer, may not hold.
        kept = [warning for warning in job.warnings if warning["code"] not in CONFIG_WARNING_CODES]
        kinds = {warning["code"] for warning in kept}
        job.warnings = [*kept, *(dict(warning) for warning in warnings if warning["code"] not in kinds)]
        job.execution = dict(execution) if job.execution is None else job.execution
        if new:
            _log_warnings(db, session, job.id, _own(db, session, claim, n_events=len(new)).event_seq, new)
        return owned.intents


def record_micro_batch(db: Database, claim: Claim, micro_batch: int) -> Intents:
    """Running stays running: the memory holds no more windows at once, which every later attempt is to know. Raises
    LeaseLost."""
    with db.write() as session:
        owned = _own(db, session, claim)
        _set_micro_batch(session, claim.job_id, micro_batch)
        return owned.intents


def record_steps(db: Database, claim: Claim, steps: Columns, progress: Mapping[str, Any] | None = None) -> Intents:
    """Running stays running: a batch of the step series, by column. Raises LeaseLost."""
    with db.write() as session:
        owned = _own(db, session, claim, **_progress(progress))
        write_steps(session, claim.job_id, steps)
        return owned.intents


def record_checkpoint(
    db: Database,
    claim: Claim,
    *,
    percent: int,
    step: int,
    epoch: float,
    folder: str,
    manifest_sha256: str,
    files: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    progress: Mapping[str, Any] | None = None,
) -> Intents:
    """Running stays running: a checkpoint whose files are on disk. Raises LeaseLost.

    A checkpoint that is new forgets earlier crashes; one that a resumed job wrote again does not, or a job that always
    dies just after it would be tried for ever.
    """
    with db.write() as session:
        owned = _own(db, session, claim, n_events=1, **_progress(progress))
        if session.get(Checkpoint, (claim.job_id, percent)) is None:
            session.execute(sa.update(jobs).where(jobs.c.id == claim.job_id).values(crashes=0))
        values = {
            "job_id": claim.job_id,
            "percent": percent,
            "step": step,
            "epoch": epoch,
            "created_at": db.now,
            "fence": claim.fence,
            "folder": folder,
            "manifest_sha256": manifest_sha256,
            "files": [dict(file) for file in files],
            "metrics": dict(metrics),
        }
        insert_or_update(session, Checkpoint, values)
        _log(
            db, session, claim.job_id, owned.event_seq, "checkpoint", {"percent": percent, "step": step, "epoch": epoch}
        )
        return owned.intents


def record_snapshot(db: Database, claim: Claim, *, step: int, folder: str, manifest_sha256: str) -> Intents:
    """Running stays running: the state to resume from, in place of the one before. Raises LeaseLost."""
    with db.write() as session:
        owned = _own(db, session, claim)
        values = {
            "job_id": claim.job_id,
            "step": step,
            "created_at": db.now,
            "fence": claim.fence,
            "folder": folder,
            "manifest_sha256": manifest_sha256,
        }
        insert_or_update(session, Snapshot, values)
        return owned.intents


def record_event(db: Database, claim: Claim, kind: str, data: Mapping[str, Any]) -> Intents:
    """Running stays running: something worth telling, `{"code", "message"}` for a warning. Raises LeaseLost."""
    with db.write() as session:
        owned = _own(db, session, claim, n_events=1)
        _log(db, session, claim.job_id, owned.event_seq, kind, dict(data))
        return owned.intents


def rewind(db: Database, claim: Claim, step: int) -> Intents:
    """Running stays running: forget the steps past `step`, which the resumed job is going to write again, and a
    snapshot past it, which could not be read. Raises LeaseLost."""
    with db.write() as session:
        owned = _own(db, session, claim)
        delete_steps_after(session, claim.job_id, step)
        snapshots = table(Snapshot)
        session.execute(sa.delete(snapshots).where(snapshots.c.job_id == claim.job_id, snapshots.c.step > step))
        return owned.intents


def finish(
    db: Database,
    claim: Claim,
    status: Literal["succeeded", "failed"],
    *,
    error: Mapping[str, Any] | None = None,
    reason: str | None = None,
    progress: Mapping[str, Any] | None = None,
) -> Job:
    """From running to succeeded or failed; to cancelled when that was asked for before.

    `error`: `{"code", "message"}`, with failed and only then. `reason`: why it succeeded before its last step, where it
    did. Raises LeaseLost.
    """
    assert (status == "failed") == (error is not None)
    with db.write() as session:
        owned = _own(db, session, claim, **_progress(progress))
        if owned.intents.cancel:
            return _leave(db, session, claim.job_id, "cancelled")
        error = None if error is None else dict(error)
        return _leave(db, session, claim.job_id, status, error=error, status_reason=reason)


def release(
    db: Database, claim: Claim, *, crash: str | None = None, outside: str | None = None, pause_reason: str | None = None
) -> Job:
    """From running to queued, when a worker drains, when its trainer ended abnormally (`crash` says how), or when the
    attempt ended for a reason outside of the job (`outside` says which: it waits, and no crash is counted); to failed,
    when the job crashed too often; to paused, when that is still asked for, or for a `pause_reason` of the worker's
    own (the disk is full); to cancelled, when that is asked for. The trainer must be dead. Raises LeaseLost."""
    with db.write() as session:
        _own(db, session, claim)
        job = load_job(session, claim.job_id)
        return _give_up(db, session, job, crash=crash, outside=outside, pause_reason=pause_reason)


def release_smaller(
    db: Database, claim: Claim, *, micro_batch: int, reason: str, warnings: Sequence[Mapping[str, str]]
) -> Job:
    """From running to queued, when the system killed the trainer because memory ran out: the next attempt computes
    fewer windows together. No crash is counted: each such end leaves less to halve. To paused or cancelled, when that
    is asked for. `reason`: for the job that waits; `warnings`: `{"code", "message"}` each. The trainer must be dead.
    Raises LeaseLost."""
    with db.write() as session:
        owned = _own(db, session, claim, n_events=len(warnings))
        _set_micro_batch(session, claim.job_id, micro_batch)
        _log_warnings(db, session, claim.job_id, owned.event_seq, warnings)
        return _give_up(db, session, load_job(session, claim.job_id), interrupted=reason)


def _set_micro_batch(session: Session, job_id: str, micro_batch: int) -> None:
    execution = session.execute(sa.select(jobs.c.execution).where(jobs.c.id == job_id)).scalar_one()
    changed = {**execution, "micro_batch": micro_batch}
    session.execute(sa.update(jobs).where(jobs.c.id == job_id).values(execution=changed))


@dataclass(frozen=True)
class _Owned:
    intents: Intents
    event_seq: int


def _own(db: Database, session: Session, claim: Claim, *, n_events: int = 0, **values: Any) -> _Owned:
    """The first statement of every write by an owner: only with this fence, and the lease is renewed."""
    row = session.execute(
        sa.update(jobs)
        .where(jobs.c.id == claim.job_id, jobs.c.fence == claim.fence, RUNNING)
        .values(lease_until=db.after(claim.lease_seconds), event_seq=jobs.c.event_seq + n_events, **values)
        .returning(jobs.c.cancel_requested_at, jobs.c.pause_requested_at, jobs.c.event_seq)
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"job {claim.job_id} is no longer held under fence {claim.fence}")
    return _Owned(Intents(row.cancel_requested_at is not None, row.pause_requested_at is not None), row.event_seq)


def _progress(progress: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if progress is None else {"progress": dict(progress)}


# Wishes of users


def request_cancel(db: Database, job_id: str) -> Job:
    """From queued or paused to cancelled; the owner of a running job is asked. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_cancellable`.
    """
    waits = jobs.c.status.in_(("queued", "paused"))
    with db.write() as session:
        job = _ask(
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
            _log_status(db, session, job)
        return job


def request_pause(db: Database, job_id: str) -> Job:
    """From queued to paused; the owner of a running job is asked. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_pausable`.
    """
    with db.write() as session:
        job = _ask(
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
            _log_status(db, session, job)
        return job


def resume(db: Database, job_id: str) -> Job:
    """From paused to queued; a running job that was asked to pause goes on. Harmless when repeated.

    Raises NotFound `job_not_found`, Conflict `not_resumable`.
    """
    paused = jobs.c.status == "paused"
    with db.write() as session:
        job = _ask(
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
            _log_status(db, session, job)
        return job


def _ask(
    session: Session,
    job_id: str,
    possible: sa.ColumnElement[bool],
    obeys: sa.ColumnElement[bool],
    **values: Any,
) -> Job | None:
    """One UPDATE, in which the status decides: a job that `obeys` at once gets an event number, another keeps its own.
    None when the status was not a `possible` one."""
    statement = (
        sa.update(Job)
        .where(jobs.c.id == job_id, possible)
        .values(**values, event_seq=jobs.c.event_seq + sa.case((obeys, 1), else_=0))
        .returning(Job)
    )
    return session.scalars(statement, execution_options=_AS_READ).one_or_none()


def _unchanged(session: Session, job_id: str, harmless: tuple[str, ...], code: str) -> Job:
    job = load_job(session, job_id)
    if job.status not in harmless:
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


# Rescue


class Rescuer:
    """Calls `rescue` at an interval, and knows when it must not: a laptop that slept, or a clock that was set, makes
    every lease look past; one interval later their owners have renewed them."""

    def __init__(self, db: Database, interval_seconds: float) -> None:
        self._db = db
        self._longest = timedelta(seconds=2 * interval_seconds)
        self._last: datetime | None = None

    def round(self) -> list[Job]:
        """One round; returns the jobs that changed their status. Skipped when the last one was more than two
        intervals ago by the database's clock, or in its future."""
        now = self._db.time()
        last, self._last = self._last, now
        if last is not None and not timedelta(0) <= now - last <= self._longest:
            return []
        return rescue(self._db)


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
        return [_give_up(db, session, job, crash=_who_is_gone(session, job, seen)) for job in found]


def _who_is_gone(session: Session, job: Job, now: datetime) -> str | None:
    worker = session.get(Worker, job.worker_id)
    return f"worker {job.worker_id} is gone" if worker is None or is_gone(worker, now) else None


def _give_up(
    db: Database,
    session: Session,
    job: Job,
    *,
    crash: str | None = None,
    outside: str | None = None,
    pause_reason: str | None = None,
    interrupted: str = "interrupted, goes on when a worker is free",
) -> Job:
    """The end of an attempt that did not finish: the one rule for an owner that lets go and for a rescuer.
    `interrupted`: why the job waits, if it waits for nothing but a worker."""
    crashes = job.crashes + (crash is not None)
    if job.cancel_requested_at is not None:
        return _leave(db, session, job.id, "cancelled", crashes=crashes)
    if crash is not None and crashes >= MAX_CRASHES:
        message = f"ended abnormally {crashes} times since the last checkpoint; the last time: {crash}"
        error = {"code": "crashed_repeatedly", "message": message}
        return _leave(db, session, job.id, "failed", crashes=crashes, error=error)
    if pause_reason is not None or job.pause_requested_at is not None:
        reason = pause_reason or "paused on request"
        return _leave(
            db, session, job.id, "paused", crashes=crashes, status_reason=reason, pause_requested_at=None
        )  # fmt: skip
    if crash is not None:
        wait = min(BACKOFF * 2 ** (crashes - 1), MAX_BACKOFF).total_seconds()
        reason = f"waits {wait:g} s after a crash: {crash}"
    elif outside is not None:
        wait = BACKOFF.total_seconds()
        reason = f"waits {wait:g} s after an end that was not the job's doing: {outside}"
    else:
        return _leave(db, session, job.id, "queued", status_reason=interrupted)
    waits = {"waits_since": db.now, "waits_seconds": wait}
    return _leave(db, session, job.id, "queued", crashes=crashes, status_reason=reason, **waits)


def _leave(db: Database, session: Session, job_id: str, status: str, **values: Any) -> Job:
    """From running, which the caller has made sure of under the row's lock, to `status`."""
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
    _log_status(db, session, job)
    return job


def _forget_snapshot(session: Session, job_id: str) -> None:
    """Delete the snapshot's row of a job that has ended: nobody resumes it, and files without a row are swept."""
    snapshots = table(Snapshot)
    session.execute(sa.delete(snapshots).where(snapshots.c.job_id == job_id))


# Events, written in the transaction of what they tell


def _log_status(db: Database, session: Session, job: Job) -> None:
    data = {
        "status": job.status,
        "status_reason": job.status_reason,
        "attempt": job.attempt,
        "error": job.error,
    }
    _log(db, session, job.id, job.event_seq, "status", data)


def _log_warnings(
    db: Database, session: Session, job_id: str, last_seq: int, warnings: Sequence[Mapping[str, str]]
) -> None:
    """One event a warning; the last has the number `last_seq`."""
    for seq, warning in enumerate(warnings, last_seq - len(warnings) + 1):
        _log(db, session, job_id, seq, "warning", warning)


def _log(db: Database, session: Session, job_id: str, seq: int, kind: str, data: Mapping[str, Any]) -> None:
    events = table(Event)
    session.execute(sa.insert(events).values(job_id=job_id, seq=seq, kind=kind, created_at=db.now, data=data))
