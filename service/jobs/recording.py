"""What a worker records of the job that it runs: its progress, steps, checkpoints, snapshots and warnings.

Every function is one short transaction that begins by checking the fence of the claim and renewing its lease; none
changes a status (`queue.py`). Each returns what users have requested meanwhile, and raises LeaseLost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from nanomoe.config_warnings import CODES as CONFIG_WARNING_CODES
from service.database.database import Database
from service.database.schema import table
from service.database.upsert import insert_or_update
from service.jobs.claim_order import jobs
from service.jobs.events import log_event, log_warnings
from service.jobs.lease import Claim, Intents, renew_lease
from service.jobs.reads import load_job
from service.jobs.series import Columns, delete_steps_after, write_steps
from service.jobs.tables import LARGE_METRICS, Checkpoint, Snapshot


def heartbeat(db: Database, claim: Claim, progress: Mapping[str, Any] | None = None) -> Intents:
    """Renew the lease, and report progress if there is any. Raises LeaseLost."""
    with db.write() as session:
        return renew_lease(db, session, claim, progress=progress).intents


def record_prepared(
    db: Database,
    claim: Claim,
    *,
    execution: Mapping[str, Any],
    n_tokens: int,
    total_steps: int,
    model: Mapping[str, int],
    warnings: Sequence[Mapping[str, Any]] = (),
    progress: Mapping[str, Any] | None = None,
) -> Intents:
    """Record what was computed before the first step. `model`: `{"n_params", "n_active_params"}`.

    An execution that an earlier attempt recorded stays. `warnings` about the config replace the earlier ones; of any
    other code the first warning stays. A warning that the job does not have yet is an event too. Raises LeaseLost.
    """
    with db.write() as session:
        renewed = renew_lease(
            db,
            session,
            claim,
            progress=progress,
            n_tokens=n_tokens,
            total_steps=total_steps,
            n_params=model["n_params"],
            n_active_params=model["n_active_params"],
        )
        job = load_job(session, claim.job_id)
        new = [dict(warning) for warning in warnings if warning not in job.warnings]
        # A warning from before the text was tokenised, or from another tokenizer, may be wrong by now.
        kept = [warning for warning in job.warnings if warning["code"] not in CONFIG_WARNING_CODES]
        kinds = {warning["code"] for warning in kept}
        job.warnings = [*kept, *(dict(warning) for warning in warnings if warning["code"] not in kinds)]
        job.execution = dict(execution) if job.execution is None else job.execution
        if new:
            log_warnings(db, session, job, renew_lease(db, session, claim, n_events=len(new)).event_seq, new)
        return renewed.intents


def record_micro_batch(db: Database, claim: Claim, micro_batch: int) -> Intents:
    """Record the largest micro-batch that fits the memory, for every later attempt. Raises LeaseLost."""
    with db.write() as session:
        renewed = renew_lease(db, session, claim)
        set_micro_batch(session, claim.job_id, micro_batch)
        return renewed.intents


def record_steps(db: Database, claim: Claim, steps: Columns, progress: Mapping[str, Any] | None = None) -> Intents:
    """Record a batch of the step series, by column. Raises LeaseLost."""
    with db.write() as session:
        renewed = renew_lease(db, session, claim, progress=progress)
        write_steps(session, claim.job_id, steps)
        return renewed.intents


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
    steps: Columns | None = None,
    progress: Mapping[str, Any] | None = None,
) -> Intents:
    """Record a checkpoint whose files are on disk, and with it a batch of the step series. Raises LeaseLost.

    A new checkpoint resets the count of crashes; one that a resumed job wrote again does not, or a job that always
    crashes just after it would be retried for ever.
    """
    with db.write() as session:
        renewed = renew_lease(db, session, claim, n_events=1, progress=progress)
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
            "metrics": {name: figure for name, figure in metrics.items() if name not in LARGE_METRICS},
            **{name: metrics.get(name) for name in LARGE_METRICS},
        }
        insert_or_update(session, Checkpoint, values)
        if steps:
            write_steps(session, claim.job_id, steps)
        data = {"percent": percent, "step": step, "epoch": epoch}
        log_event(db, session, claim.job, renewed.event_seq, "checkpoint", data)
        return renewed.intents


def record_snapshot(db: Database, claim: Claim, *, step: int, folder: str, manifest_sha256: str) -> Intents:
    """Record the state to resume from, in place of the one before. Raises LeaseLost."""
    with db.write() as session:
        renewed = renew_lease(db, session, claim)
        values = {
            "job_id": claim.job_id,
            "step": step,
            "created_at": db.now,
            "fence": claim.fence,
            "folder": folder,
            "manifest_sha256": manifest_sha256,
        }
        insert_or_update(session, Snapshot, values)
        return renewed.intents


def record_event(db: Database, claim: Claim, kind: str, data: Mapping[str, Any]) -> Intents:
    """Record an event; the data of a `warning` are `{"code", "message"}`. Raises LeaseLost."""
    with db.write() as session:
        renewed = renew_lease(db, session, claim, n_events=1)
        log_event(db, session, claim.job, renewed.event_seq, kind, dict(data))
        return renewed.intents


def rewind(db: Database, claim: Claim, step: int) -> Intents:
    """Delete the steps past `step`, which the resumed job is going to write again, and a snapshot past it, which could
    not be read. Raises LeaseLost."""
    with db.write() as session:
        renewed = renew_lease(db, session, claim)
        delete_steps_after(session, claim.job_id, step)
        snapshots = table(Snapshot)
        session.execute(sa.delete(snapshots).where(snapshots.c.job_id == claim.job_id, snapshots.c.step > step))
        return renewed.intents


def set_micro_batch(session: Session, job_id: str, micro_batch: int) -> None:
    """Set the micro-batch in the execution of a job whose lease the transaction has renewed."""
    execution = session.execute(sa.select(jobs.c.execution).where(jobs.c.id == job_id)).scalar_one()
    changed = {**execution, "micro_batch": micro_batch}
    session.execute(sa.update(jobs).where(jobs.c.id == job_id).values(execution=changed))
