"""Submitting: from nothing to queued, or with weights from elsewhere to succeeded: a job or a whole sweep in one short
transaction, exactly once for an idempotency key.

What happens to a job afterwards is in `queue.py`. Knows no HTTP and no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.access import audit
from service.database.database import Database, caller_of
from service.database.schema import table
from service.database.upsert import insert_unless_there
from service.errors import Invalid, NotFound, TooManyRequests
from service.jobs.claim_order import QUEUED, jobs
from service.jobs.counters import raise_counter
from service.jobs.events import Submitted, log_event, log_status, log_statuses
from service.jobs.ids import new_id
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.ownership import visible_jobs
from service.jobs.quotas import check_submission
from service.jobs.tables import Checkpoint, Job, Sweep, Text

SWEEP_TAG = "sweep"
"""The tag by which the jobs of a sweep are found in lists; its value is the sweep's id."""

texts = table(Text)
sweeps = table(Sweep)


def submit_job(db: Database, new: NewJob, *, max_queued: int | None = None) -> tuple[Job, bool]:
    """From nothing to queued. Returns the job, and whether it is new or the one its idempotency key already made.

    Raises Invalid `idempotency_key_reused`, NotFound `job_not_found` (the parent), TooManyRequests `queue_full`,
    QuotaExceeded.
    """
    text = new.text.encode()
    sha256 = hashlib.sha256(text).hexdigest()
    request_sha256 = _request_sha256(_identity(new, sha256))
    with db.write() as session:
        if (job := _find_job_by_key(session, new, request_sha256)) is not None:
            return job, False
        _refuse_if_full(session, 1, max_queued)
        check_submission(db, session, n_jobs=1, texts={sha256: len(text)})
        if new.parent_id is not None:
            _lock_parent(session, new.parent_id)
        _lock_text(db, session, sha256, text)
        values = _queued(new, db.caller.owner, _next_seq(session), sha256, len(text)) | {
            "request_sha256": request_sha256
        }
        insert = insert_unless_there(session, Job).values(**values, created_at=db.now)
        job = session.scalars(insert.returning(Job)).one_or_none()
        if job is None:  # a submit with the same key has committed since we looked
            job = _find_job_by_key(session, new, request_sha256)
            assert job is not None
            return job, False
        log_status(db, session, job)
        audit.record(db, session, "job.submit", job.id)
        return job, True


def submit_finished_job(
    db: Database,
    new: NewJob,
    *,
    job_id: str,
    reason: str,
    folder: str,
    manifest_sha256: str,
    files: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> Job:
    """From nothing to succeeded: a job whose weights came from elsewhere, with its checkpoint at 100 percent, whose
    files are on the disk. No worker ever claims it. `reason`: where the weights came from. Raises QuotaExceeded."""
    content = new.text.encode()
    sha256 = hashlib.sha256(content).hexdigest()
    n_bytes = sum(file["size"] for file in files)
    with db.write() as session:
        check_submission(db, session, n_jobs=0, texts={sha256: len(content)}, n_bytes=n_bytes)
        _lock_text(db, session, sha256, content)
        values = {
            "id": job_id,
            "seq": _next_seq(session),
            "owner": db.caller.owner,
            "name": new.name,
            "tags": dict(new.tags),
            "status": "succeeded",
            "status_reason": reason,
            "priority": new.priority,
            "created_at": db.now,
            "finished_at": db.now,
            "fence": 0,
            "attempt": 0,
            "crashes": 0,
            "config": dict(new.config),
            "progress": {},
            "text_sha256": sha256,
            "text_n_bytes": len(content),
            "n_tokens": new.n_tokens,
            "n_params": new.n_params,
            "n_active_params": new.n_active_params,
            "warnings": list(new.warnings),
            "event_seq": 2,
        }
        job = session.scalars(sa.insert(Job).values(**values).returning(Job)).one()
        position = {"percent": 100, "step": 0, "epoch": 0}
        checkpoint = {
            **position,
            "job_id": job_id,
            "created_at": db.now,
            "fence": 0,
            "folder": folder,
            "manifest_sha256": manifest_sha256,
            "files": [dict(file) for file in files],
            "n_bytes": n_bytes,
            "metrics": dict(metrics),
        }
        session.execute(sa.insert(table(Checkpoint)).values(**checkpoint))
        log_event(db, session, job, 1, "checkpoint", position)
        log_status(db, session, job)
        audit.record(db, session, "job.import", job.id)
        return job


def submit_sweep(db: Database, new: NewSweep, *, max_queued: int | None = None) -> tuple[Sweep, bool]:
    """From nothing to queued, all jobs of a sweep or none. Returns the sweep, and whether it is new or the one its
    idempotency key already made.

    Raises Invalid `idempotency_key_reused`, NotFound `job_not_found` (a parent), TooManyRequests `queue_full`,
    QuotaExceeded.
    """
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in {job.text for job in new.jobs}}
    request_sha256 = _request_sha256(
        [new.name, new.tags, *(_identity(job, digests[job.text]) for job in new.jobs)]
    )  # fmt: skip
    with db.write() as session:
        if (sweep := _find_sweep_by_key(session, new, request_sha256)) is not None:
            return sweep, False
        _refuse_if_full(session, len(new.jobs), max_queued)
        sizes = {sha256: len(text.encode()) for text, sha256 in digests.items()}
        check_submission(db, session, n_jobs=len(new.jobs), texts=sizes)
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
            "owner": db.caller.owner,
            "name": new.name,
            "tags": dict(new.tags),
            "created_at": db.now,
            "config": dict(new.config),
            "parameters": [dict(parameter) for parameter in new.parameters],
            "idempotency_key": new.idempotency_key,
            "request_sha256": request_sha256,
        }
        insert = insert_unless_there(session, Sweep).values(**values)
        sweep = session.scalars(insert.returning(Sweep)).one_or_none()
        if sweep is None:  # a submit with the same key has committed since we looked
            sweep = _find_sweep_by_key(session, new, request_sha256)
            assert sweep is not None
            return sweep, False
        member = {"sweep_id": sweep.id}
        rows = [
            _queued(job, db.caller.owner, seq, digests[job.text], n_bytes[job.text])
            | member
            | {"tags": {**job.tags, SWEEP_TAG: sweep.id}, "request_sha256": None}
            for seq, job in enumerate(new.jobs, first)
        ]
        session.execute(sa.insert(jobs).values(created_at=db.now), rows)
        log_statuses(db, session, [Submitted(row["id"], sweep.id) for row in rows])
        audit.record(db, session, "sweep.submit", sweep.id)
        return sweep, True


def _queued(new: NewJob, owner: str, seq: int, text_sha256: str, text_n_bytes: int) -> dict[str, Any]:
    """The row of a new job, but for the time."""
    return {
        "id": new_id(),
        "seq": seq,
        "owner": owner,
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
        "cohort_key": new.cohort_key,
        "warnings": list(new.warnings),
        "parent_id": new.parent_id,
        "parent_percent": new.parent_percent,
        "idempotency_key": new.idempotency_key,
        "event_seq": 1,
    }


def _find_job_by_key(session: Session, new: NewJob, request_sha256: str) -> Job | None:
    if new.idempotency_key is None:
        return None
    same_key = (jobs.c.owner == caller_of(session).owner) & (jobs.c.idempotency_key == new.idempotency_key)
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
    same_key = (sweeps.c.owner == caller_of(session).owner) & (sweeps.c.idempotency_key == new.idempotency_key)
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
    held = (
        sa.select(jobs.c.id)
        .where(jobs.c.id == parent_id, visible_jobs(session))
        .with_for_update(read=True, key_share=True)
    )
    if session.scalar(held) is None:
        raise NotFound("job_not_found", f"there is no job {parent_id!r} to start from")


def _lock_text(db: Database, session: Session, sha256: str, content: bytes) -> None:
    """Store the text unless it is there, and lock it against deletion until this transaction ends."""
    held = sa.select(texts.c.sha256).where(texts.c.sha256 == sha256).with_for_update(read=True, key_share=True)
    while session.scalar(held) is None:
        values = {"sha256": sha256, "n_bytes": len(content), "content": content, "created_at": db.now}
        session.execute(insert_unless_there(session, Text).values(**values))


def _next_seq(session: Session, n: int = 1) -> int:
    """The last of the next `n` places in the order of submission; taken late (`raise_counter`)."""
    return raise_counter(session, "jobs", n)
