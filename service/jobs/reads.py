"""What is read of jobs and of what they recorded: texts, checkpoints, snapshots, steps, events. Changes nothing."""

from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlmodel import Session, col, select

from service.database.database import Database
from service.database.schema import table
from service.errors import NotFound
from service.jobs.series import read_series, read_steps_after
from service.jobs.statuses import STATUSES, Status
from service.jobs.tables import Checkpoint, Event, Job, Snapshot, Text


def get_job(db: Database, job_id: str) -> Job:
    """The job of that id. Raises NotFound `job_not_found`."""
    with db.read() as session:
        return load_job(session, job_id)


def load_job(session: Session, job_id: str) -> Job:
    """The job of that id, within a transaction. Raises NotFound `job_not_found`."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    return job


class NewestFigures(NamedTuple):
    """Figures of the newest checkpoint of a job."""

    percent: int
    loss: float | None
    perplexity: float | None


def list_measured_jobs(
    db: Database,
    *,
    status: Status | None = None,
    tag: tuple[str, str | None] | None = None,
    before: int | None = None,
    limit: int = 50,
) -> list[tuple[Job, NewestFigures | None]]:
    """`list_jobs`, each with the figures of its newest checkpoint: one query, which reads no reconstruction."""
    c = table(Checkpoint).c
    newest = sa.select(sa.func.max(c.percent)).where(c.job_id == Job.id).correlate(Job).scalar_subquery()
    of = table(Checkpoint).alias("newest").c
    figures = (of.percent, of.metrics["loss"].as_float(), of.metrics["perplexity"].as_float())
    query = (
        _newest_first(sa.select(Job, *figures), status, tag, before)
        .outerjoin(of.percent.table, sa.and_(of.job_id == Job.id, of.percent == newest))
        .limit(limit)
    )
    with db.read() as session:
        return [
            (job, None if percent is None else NewestFigures(percent, loss, perplexity))
            for job, percent, loss, perplexity in session.execute(query)
        ]


def list_jobs(
    db: Database,
    *,
    status: Status | None = None,
    tag: tuple[str, str | None] | None = None,
    before: int | None = None,
    limit: int = 50,
) -> list[Job]:
    """The newest jobs first; `before` is the `seq` of the last one of the page before, so inserts do not shift pages.

    `tag`: its key, which must have no quotes, and its value; None stands for any value.
    """
    with db.read() as session:
        return list(session.scalars(_newest_first(sa.select(Job), status, tag, before).limit(limit)))


def _newest_first(
    query: "sa.Select[Any]", status: Status | None, tag: tuple[str, str | None] | None, before: int | None
) -> "sa.Select[Any]":
    """A query of jobs, filtered, the newest first."""
    query = query.order_by(col(Job.seq).desc())
    if status is not None:
        query = query.where(col(Job.status) == status)
    if tag is not None:
        key, value = tag
        stored = table(Job).c.tags[key].as_string()
        query = query.where(stored.is_not(None) if value is None else stored == value)
    return query if before is None else query.where(col(Job.seq) < before)


def count_jobs(db: Database) -> dict[str, int]:
    """How many jobs have each status; every status is a key."""
    with db.read() as session:
        counts = dict(
            session.execute(sa.select(table(Job).c.status, sa.func.count()).group_by(table(Job).c.status)).all()
        )
    return {status: counts.get(status, 0) for status in STATUSES}


def get_text(db: Database, sha256: str) -> bytes:
    """A training text as UTF-8. Raises NotFound `text_not_found`."""
    with db.read() as session:
        text = session.get(Text, sha256)
    if text is None:
        raise NotFound("text_not_found", f"there is no text {sha256}")
    return text.content


# What a job recorded


def list_checkpoints(db: Database, job_id: str) -> list[Checkpoint]:
    """The checkpoints of a job by percent, ascending. Raises NotFound `job_not_found`."""
    with db.read() as session:
        load_job(session, job_id)
        query = select(Checkpoint).where(col(Checkpoint.job_id) == job_id).order_by(col(Checkpoint.percent))
        return list(session.exec(query))


def get_checkpoint(db: Database, job_id: str, percent: int | Literal["latest"]) -> Checkpoint:
    """The checkpoint of that percent, or the newest. Raises NotFound `job_not_found`, `checkpoint_not_found`."""
    with db.read() as session:
        load_job(session, job_id)
        query = select(Checkpoint).where(col(Checkpoint.job_id) == job_id).order_by(col(Checkpoint.percent).desc())
        if percent != "latest":
            query = query.where(col(Checkpoint.percent) == percent)
        found = session.exec(query.limit(1)).first()
    if found is None:
        raise NotFound("checkpoint_not_found", f"job {job_id} has no checkpoint {percent} yet")
    return found


def find_snapshot(db: Database, job_id: str) -> Snapshot | None:
    """The state to resume from, if one was recorded."""
    with db.read() as session:
        return session.get(Snapshot, job_id)


def series(db: Database, job_id: str, points: int = 1000) -> dict[str, list[Any]]:
    """The step series by column, thinned to at most `points` steps that keep the extremes.

    Raises ValueError for fewer points than `MIN_POINTS`.
    """
    with db.read() as session:
        return read_series(session, job_id, points)


def steps_after(db: Database, job_id: str, step: int, limit: int) -> list[sa.Row[Any]]:
    """The next `limit` rows (step, train_loss, lr, grad_norm) past `step`."""
    with db.read() as session:
        return read_steps_after(session, job_id, step, limit)


def events_after(db: Database, job_id: str, seq: int, limit: int = 1000) -> list[Event]:
    """The next `limit` events past number `seq`, oldest first."""
    query = select(Event).where(col(Event.job_id) == job_id, col(Event.seq) > seq).order_by(col(Event.seq))
    with db.read() as session:
        return list(session.exec(query.limit(limit)))
