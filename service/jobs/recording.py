"""What a worker records of the job that it runs: its progress, steps, checkpoints, snapshots and warnings.

What one or several jobs have to record is one short transaction that begins by checking the fence of each claim and
renewing its lease; none changes a status (`queue.py`). It returns what users have requested meanwhile; a lost lease is
that job's alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import sqlalchemy as sa
from sqlmodel import Session

from nanomoe.config_warnings import CODES as CONFIG_WARNING_CODES
from service.database.database import Database
from service.database.schema import table
from service.database.upsert import insert_or_update
from service.errors import LeaseLost
from service.jobs.claim_order import jobs
from service.jobs.events import log_event, log_warnings
from service.jobs.lease import Claim, Intents, Renewal, Renewed, lost, only, renew_lease, renew_leases
from service.jobs.reads import load_job
from service.jobs.series import Columns, delete_steps_after, write_steps
from service.jobs.tables import LARGE_METRICS, Checkpoint, Snapshot


@dataclass(frozen=True)
class Report:
    """What is to be recorded of a running job. Without anything but the claim it is a heartbeat."""

    claim: Claim
    steps: Columns | None = None
    """A batch of the step series, by column."""

    progress: Mapping[str, Any] | None = None
    n_events: int = 0
    """Number of the events that `write` is known to add."""

    write: Callable[[Database, Session, Renewed], int] | None = None
    """What else it writes, in the transaction that has renewed the lease. Returns how many events it has added beyond
    `n_events`. It must not depend on `steps`, which are written after it."""

    @classmethod
    def merged(cls, reports: Sequence[Self]) -> Self:
        """Several reports of one job as one, in their order."""
        if len(reports) == 1:
            return reports[0]
        with_steps = [report.steps for report in reports if report.steps]
        return cls(
            reports[0].claim,
            {name: [figure for steps in with_steps for figure in steps[name]] for name in with_steps[0]}
            if with_steps
            else None,
            next((report.progress for report in reversed(reports) if report.progress is not None), None),
            sum(report.n_events for report in reports),
            lambda db, session, renewed: _write_in_order(db, session, renewed, reports),
        )


def _write_in_order(db: Database, session: Session, renewed: Renewed, reports: Sequence[Report]) -> int:
    """Do the writes of several reports of one job, each of which numbers its events after those before it."""
    more = 0
    seq = renewed.event_seq - sum(report.n_events for report in reports)
    for report in reports:
        seq += report.n_events
        if report.write is not None:
            added = report.write(db, session, replace(renewed, event_seq=seq))
            seq, more = seq + added, more + added
    return more


def record_reports(db: Database, reports: Sequence[Report]) -> list[Intents | LeaseLost]:
    """Renew the leases of several jobs of one worker, and record what there is of each, in one transaction: the leases,
    the progress and the steps of all of them in one statement each. A job whose lease is lost is left out alone."""
    with db.write() as session:
        renewals = [Renewal(report.claim, report.progress, report.n_events) for report in reports]
        renewed = renew_leases(db, session, renewals)
        held = [report for report in reports if report.claim.key in renewed]
        for report in held:
            if report.write is not None:
                report.write(db, session, renewed[report.claim.key])
        write_steps(session, {report.claim.job_id: report.steps for report in held if report.steps})
        return [
            renewed[report.claim.key].intents if report.claim.key in renewed else lost(report.claim)
            for report in reports
        ]


def record(db: Database, report: Report) -> Intents:
    """`record_reports` of one. Raises LeaseLost."""
    return only(record_reports(db, [report]))


def heartbeat(db: Database, claim: Claim, progress: Mapping[str, Any] | None = None) -> Intents:
    """Renew the lease, and report progress if there is any. Raises LeaseLost."""
    return record(db, Report(claim, progress=progress))


def prepared_report(
    claim: Claim,
    *,
    execution: Mapping[str, Any],
    n_tokens: int,
    total_steps: int,
    model: Mapping[str, int],
    warnings: Sequence[Mapping[str, Any]] = (),
    progress: Mapping[str, Any] | None = None,
) -> Report:
    """What was computed before the first step. `model`: `{"n_params", "n_active_params"}`.

    An execution that an earlier attempt recorded stays. `warnings` about the config replace the earlier ones; of any
    other code the first warning stays. A warning that the job does not have yet is an event too.
    """

    def write(db: Database, session: Session, renewed: Renewed) -> int:
        job = load_job(session, claim.job_id)
        new = [dict(warning) for warning in warnings if warning not in job.warnings]
        # A warning from before the text was tokenised, or from another tokenizer, may be wrong by now.
        kept = [warning for warning in job.warnings if warning["code"] not in CONFIG_WARNING_CODES]
        kinds = {warning["code"] for warning in kept}
        job.warnings = [*kept, *(dict(warning) for warning in warnings if warning["code"] not in kinds)]
        job.execution = dict(execution) if job.execution is None else job.execution
        job.n_tokens, job.total_steps = n_tokens, total_steps
        job.n_params, job.n_active_params = model["n_params"], model["n_active_params"]
        session.flush()
        if new:
            renew_lease(db, session, claim, n_events=len(new))
            log_warnings(db, session, job, renewed.event_seq + len(new), new)
        return len(new)

    return Report(claim, progress=progress, write=write)


def record_prepared(db: Database, claim: Claim, **values: Any) -> Intents:
    """Record a `prepared_report`. Raises LeaseLost."""
    return record(db, prepared_report(claim, **values))


def micro_batch_report(claim: Claim, micro_batch: int) -> Report:
    """The largest micro-batch that fits the memory, for every later attempt."""

    def write(db: Database, session: Session, renewed: Renewed) -> int:
        set_micro_batch(session, claim.job_id, micro_batch)
        return 0

    return Report(claim, write=write)


def record_micro_batch(db: Database, claim: Claim, micro_batch: int) -> Intents:
    """Record a `micro_batch_report`. Raises LeaseLost."""
    return record(db, micro_batch_report(claim, micro_batch))


def record_steps(db: Database, claim: Claim, steps: Columns, progress: Mapping[str, Any] | None = None) -> Intents:
    """Record a batch of the step series, by column. Raises LeaseLost."""
    return record(db, Report(claim, steps, progress))


def checkpoint_report(
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
) -> Report:
    """A checkpoint whose files are on disk.

    A new checkpoint resets the count of crashes; one that a resumed job wrote again does not, or a job that always
    crashes just after it would be retried for ever.
    """

    def write(db: Database, session: Session, renewed: Renewed) -> int:
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
            "n_bytes": sum(file["size"] for file in files),
            "metrics": {name: figure for name, figure in metrics.items() if name not in LARGE_METRICS},
            **{name: metrics.get(name) for name in LARGE_METRICS},
        }
        insert_or_update(session, Checkpoint, values)
        data = {"percent": percent, "step": step, "epoch": epoch}
        log_event(db, session, claim.job, renewed.event_seq, "checkpoint", data)
        return 0

    return Report(claim, progress=progress, n_events=1, write=write)


def record_checkpoint(db: Database, claim: Claim, **values: Any) -> Intents:
    """Record a `checkpoint_report`. Raises LeaseLost."""
    return record(db, checkpoint_report(claim, **values))


def snapshot_report(claim: Claim, *, step: int, folder: str, manifest_sha256: str) -> Report:
    """The state to resume from, in place of the one before."""

    def write(db: Database, session: Session, renewed: Renewed) -> int:
        values = {
            "job_id": claim.job_id,
            "step": step,
            "created_at": db.now,
            "fence": claim.fence,
            "folder": folder,
            "manifest_sha256": manifest_sha256,
        }
        insert_or_update(session, Snapshot, values)
        return 0

    return Report(claim, write=write)


def record_snapshot(db: Database, claim: Claim, *, step: int, folder: str, manifest_sha256: str) -> Intents:
    """Record a `snapshot_report`. Raises LeaseLost."""
    return record(db, snapshot_report(claim, step=step, folder=folder, manifest_sha256=manifest_sha256))


def event_report(claim: Claim, kind: str, data: Mapping[str, Any]) -> Report:
    """An event; the data of a `warning` are `{"code", "message"}`."""

    def write(db: Database, session: Session, renewed: Renewed) -> int:
        log_event(db, session, claim.job, renewed.event_seq, kind, dict(data))
        return 0

    return Report(claim, n_events=1, write=write)


def record_event(db: Database, claim: Claim, kind: str, data: Mapping[str, Any]) -> Intents:
    """Record an `event_report`. Raises LeaseLost."""
    return record(db, event_report(claim, kind, data))


def rewinding(claim: Claim, step: int) -> Report:
    """The deletion of the steps past `step`, which the resumed job is going to write again, and of a snapshot past it,
    which could not be read."""

    def write(db: Database, session: Session, renewed: Renewed) -> int:
        delete_steps_after(session, claim.job_id, step)
        snapshots = table(Snapshot)
        session.execute(sa.delete(snapshots).where(snapshots.c.job_id == claim.job_id, snapshots.c.step > step))
        return 0

    return Report(claim, write=write)


def rewind(db: Database, claim: Claim, step: int) -> Intents:
    """Do what a `rewinding` says. Raises LeaseLost."""
    return record(db, rewinding(claim, step))


def set_micro_batch(session: Session, job_id: str, micro_batch: int) -> None:
    """Set the micro-batch in the execution of a job whose lease the transaction has renewed."""
    execution = session.execute(sa.select(jobs.c.execution).where(jobs.c.id == job_id)).scalar_one()
    changed = {**execution, "micro_batch": micro_batch}
    session.execute(sa.update(jobs).where(jobs.c.id == job_id).values(execution=changed))
