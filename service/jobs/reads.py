"""What is read of jobs and of what they recorded: texts, checkpoints, snapshots, steps, events. Changes nothing."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlmodel import Session, col, select

from service.database.database import Database
from service.database.schema import table
from service.errors import NotFound
from service.jobs.ids import begins_with
from service.jobs.ownership import is_visible, visible_jobs
from service.jobs.series import read_series, read_steps_after
from service.jobs.statuses import STATUSES, Status
from service.jobs.tables import Checkpoint, Event, Job, Snapshot, Text


def get_job(db: Database, job_id: str) -> Job:
    """The job of that id. Raises NotFound `job_not_found`."""
    with db.read() as session:
        return load_job(session, job_id)


def load_job(session: Session, job_id: str) -> Job:
    """The job of that id, within a transaction. Raises NotFound `job_not_found`, for one that is another's, too."""
    job = session.get(Job, job_id)
    if job is None or not is_visible(session, job):
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    return job


class NewestFigures(NamedTuple):
    """Figures of the newest checkpoint of a job."""

    percent: int
    loss: float | None
    perplexity: float | None


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """The jobs that are listed: those for which all of this holds."""

    status: Status | None = None

    tag: tuple[str, str | None] | None = None
    """Key of a tag, which must have no quotes, and its value; None stands for any value."""

    name: str | None = None
    """The whole name."""

    id_prefix: str | None = None
    """What the id begins with."""

    q: str | None = None
    """A part of the name, in either case, or the beginning of the id or of the sweep's id."""

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The conditions on the table of jobs."""
        c = table(Job).c
        conditions = []
        if self.status is not None:
            conditions.append(c.status == self.status)
        if self.tag is not None:
            key, value = self.tag
            stored = c.tags[key].as_string()
            conditions.append(stored.is_not(None) if value is None else stored == value)
        if self.name is not None:
            conditions.append(c.name == self.name)
        if self.id_prefix is not None:
            conditions.append(begins_with(c.id, self.id_prefix))
        if self.q is not None:
            begins = [column.startswith(self.q.lower(), autoescape=True) for column in (c.id, c.sweep_id)]
            conditions.append(sa.or_(c.name.icontains(self.q, autoescape=True), *begins))
        return conditions


EVERY_JOB = JobFilter()
"""No job is left out."""


def list_measured_jobs(
    db: Database, wanted: JobFilter = EVERY_JOB, *, before: int | None = None, limit: int = 50
) -> list[tuple[Job, NewestFigures | None]]:
    """The newest jobs first, each with the figures of its newest checkpoint: one query, which reads no reconstruction.
    `before` is the `seq` of the last one of the page before, so inserts do not shift pages."""
    query = _newest_first(_measured(), wanted, before).limit(limit)
    with db.read() as session:
        return [_with_figures(row) for row in session.execute(query.where(visible_jobs(session)))]


def get_measured_job(db: Database, job_id: str) -> tuple[Job, NewestFigures | None]:
    """The job of that id, with the figures of its newest checkpoint. Raises NotFound `job_not_found`."""
    with db.read() as session:
        row = session.execute(_measured().where(col(Job.id) == job_id, visible_jobs(session))).first()
    if row is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    return _with_figures(row)


def _measured() -> "sa.Select[Any]":
    """A query of jobs, each with figures of its newest checkpoint."""
    c = table(Checkpoint).c
    newest = sa.select(sa.func.max(c.percent)).where(c.job_id == Job.id).correlate(Job).scalar_subquery()
    of = table(Checkpoint).alias("newest").c
    figures = (of.percent, of.metrics["loss"].as_float(), of.metrics["perplexity"].as_float())
    joined = sa.and_(of.job_id == Job.id, of.percent == newest)
    return sa.select(Job, *figures).outerjoin(of.percent.table, joined)


def _with_figures(row: Any) -> tuple[Job, NewestFigures | None]:
    job, percent, *figures = row
    return job, None if percent is None else NewestFigures(percent, *figures)


def list_jobs(db: Database, wanted: JobFilter = EVERY_JOB, *, before: int | None = None, limit: int = 50) -> list[Job]:
    """The newest jobs first, as `list_measured_jobs` lists them, without figures."""
    query = _newest_first(sa.select(Job), wanted, before).limit(limit)
    with db.read() as session:
        return list(session.scalars(query.where(visible_jobs(session))))


def _newest_first(query: "sa.Select[Any]", wanted: JobFilter, before: int | None) -> "sa.Select[Any]":
    query = query.where(*wanted.conditions()).order_by(col(Job.seq).desc())
    return query if before is None else query.where(col(Job.seq) < before)


def count_jobs(db: Database, wanted: JobFilter = EVERY_JOB) -> dict[Status, int]:
    """How many of these jobs have each status; every status is a key."""
    c = table(Job).c
    query = sa.select(c.status, sa.func.count()).where(*wanted.conditions()).group_by(c.status)
    with db.read() as session:
        counts: dict[Status, int] = dict(session.execute(query.where(visible_jobs(session))).all())
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


def series(
    db: Database, job_id: str, points: int = 1000, *, from_step: int | None = None, to_step: int | None = None
) -> dict[str, list[Any]]:
    """The step series by column, or a part of it, thinned to at most `points` steps that keep the extremes.

    Raises ValueError for fewer points than `MIN_POINTS`.
    """
    with db.read() as session:
        return read_series(session, job_id, points, from_step=from_step, to_step=to_step)


def steps_after(db: Database, job_id: str, step: int, limit: int) -> list[sa.Row[Any]]:
    """The next `limit` rows (step, train_loss, lr, grad_norm) past `step`."""
    with db.read() as session:
        return read_steps_after(session, job_id, step, limit)


def events_after(db: Database, job_id: str, seq: int, limit: int = 1000) -> list[Event]:
    """The next `limit` events past number `seq`, oldest first."""
    query = select(Event).where(col(Event.job_id) == job_id, col(Event.seq) > seq).order_by(col(Event.seq))
    with db.read() as session:
        return list(session.exec(query.limit(limit)))
