"""What a comparison reads of many jobs: configs, the figures of their checkpoints, their envelopes. Reads no
reconstruction, and changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic_core import from_json
from sqlmodel import Session

from nanomoe.config import JobConfig
from service.database.database import Database
from service.database.schema import table
from service.errors import Invalid, NotFound
from service.jobs.envelope import LossEnvelope, envelope_of_series
from service.jobs.ownership import visible_jobs
from service.jobs.statuses import Status
from service.jobs.sweeps import load_sweep
from service.jobs.tables import SERIES, Checkpoint, Envelope, Job, Step

MAX_JOBS = 1000
"""Most jobs that are compared."""

_jobs = table(Job)
_checkpoints = table(Checkpoint)
_envelopes = table(Envelope)
_steps = table(Step)

_DEFAULTS = JobConfig().model_dump(mode="json")
"""Config of the reference run: what a row means that was written before a knob existed."""


def _json(column: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    """A JSON column as text, which pydantic parses in a third of the time that a driver takes."""
    return sa.cast(column, sa.Text).label(column.key)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which jobs are compared: those of a sweep, or with a tag, or these."""

    sweep_id: str | None = None
    tag: tuple[str, str | None] | None = None
    """Key of the tag, which must have no quotes, and its value; None stands for any value."""

    job_ids: Sequence[str] = ()

    def condition(self, session: Session) -> sa.ColumnElement[bool]:
        """The condition on the table of jobs, of which the session's caller sees these."""
        return self._chosen() & visible_jobs(session)

    def _chosen(self) -> sa.ColumnElement[bool]:
        if self.sweep_id is not None:
            return _jobs.c.sweep_id == self.sweep_id
        if self.tag is not None:
            key, value = self.tag
            stored: sa.ColumnElement[Any] = _jobs.c.tags[key].as_string()
            return stored.is_not(None) if value is None else stored == value
        return _jobs.c.id.in_(self.job_ids)

    def check(self, session: Session, found: Sequence[str]) -> None:
        """Raise NotFound `sweep_not_found`, `job_not_found`, or Invalid `too_many_jobs`, unless `found` are all."""
        if self.sweep_id is not None and not found:
            load_sweep(session, self.sweep_id)
        if len(found) > MAX_JOBS:
            raise Invalid("too_many_jobs", f"more than {MAX_JOBS:,} jobs have this tag: that many are compared at most")
        if missing := [job_id for job_id in self.job_ids if job_id not in found]:
            others = f", and {len(missing) - 1} others are missing too" if len(missing) > 1 else ""
            raise NotFound("job_not_found", f"there is no job {missing[0]!r}{others}")


@dataclass(frozen=True)
class Quarter:
    """A recorded checkpoint."""

    percent: int
    step: int
    created_at: datetime
    figures: Mapping[str, float | None]
    """The metrics that were asked for."""

    perplexity: float | None


@dataclass(frozen=True)
class ComparedJob:
    """A job, and what it has recorded so far."""

    id: str
    name: str | None
    status: Status
    started_at: datetime | None
    values: Mapping[str, Any]
    """Complete config, and `text`: the SHA-256 of the text."""

    quarters: list[Quarter] = field(default_factory=list)
    at_step: Mapping[str, float | None] | None = None
    """Figures of the step that was asked for; None where the job has not done it."""


def read_jobs(db: Database, selection: Selection, metrics: Sequence[str], at_step: int | None) -> list[ComparedJob]:
    """The jobs of a selection in the order of submission, with these metrics of each checkpoint, and the series at a
    step. A name that begins with `moe.` is a mean over the routers.

    Raises NotFound `sweep_not_found`, `job_not_found`, Invalid `too_many_jobs`.
    """
    c = _jobs.c
    query = sa.select(c.id, c.name, c.status, c.started_at, _json(c.config), c.text_sha256)
    with db.read() as session:
        query = query.where(selection.condition(session))
        rows = session.execute(query.order_by(c.seq).limit(MAX_JOBS + 1)).all()
        selection.check(session, [row.id for row in rows])
        quarters = _read_quarters(session, selection, metrics)
        at = {} if at_step is None else _read_step(session, selection, at_step)
    return [
        ComparedJob(
            row.id,
            row.name,
            row.status,
            row.started_at,
            _DEFAULTS | from_json(row.config) | {"text": row.text_sha256},
            quarters.get(row.id, []),
            at.get(row.id),
        )
        for row in rows
    ]


def _read_quarters(session: Session, selection: Selection, metrics: Sequence[str]) -> dict[str, list[Quarter]]:
    c = _checkpoints.c
    of_routers = any(name.startswith("moe.") for name in metrics)
    columns = [c.job_id, c.percent, c.step, c.created_at, _json(c.metrics), *([_json(c.moe)] if of_routers else [])]
    query = sa.select(*columns).where(c.job_id.in_(sa.select(_jobs.c.id).where(selection.condition(session))))
    found: dict[str, list[Quarter]] = {}
    for job_id, percent, step, created_at, *stored in session.execute(query.order_by(c.job_id, c.percent)):
        recorded = from_json(stored[0])
        if of_routers and stored[1] is not None:
            recorded |= {f"moe.{name}": figure for name, figure in from_json(stored[1])["mean"].items()}
        figures = {name: recorded.get(name) for name in metrics}
        quarter = Quarter(percent, step, created_at, figures, recorded.get("perplexity"))
        found.setdefault(job_id, []).append(quarter)
    return found


def _read_step(session: Session, selection: Selection, step: int) -> dict[str, dict[str, float | None]]:
    chosen = sa.select(_jobs.c.id).where(selection.condition(session))
    query = sa.select(_steps).where(_steps.c.step == step, _steps.c.job_id.in_(chosen))
    return {row.job_id: {name: getattr(row, name) for name in SERIES} for row in session.execute(query)}


def read_envelopes(db: Database, selection: Selection) -> list[tuple[str, LossEnvelope]]:
    """The envelope of each job of a selection, in the order of submission, by one query.

    Raises NotFound `sweep_not_found`, `job_not_found`, Invalid `too_many_jobs`.
    """
    c = _envelopes.c
    query = (
        sa.select(_jobs.c.id, _jobs.c.progress, c.width, c.last_step, _json(c.train_loss))
        .outerjoin_from(_jobs, _envelopes, c.job_id == _jobs.c.id)
        .order_by(_jobs.c.seq)
        .limit(MAX_JOBS + 1)
    )
    with db.read() as session:
        rows = session.execute(query.where(selection.condition(session))).all()
        selection.check(session, [row.id for row in rows])
        return [(row.id, _envelope(session, row)) for row in rows]


def _envelope(session: Session, row: Any) -> LossEnvelope:
    # Of a job that a worker of an earlier version has trained, the row is missing or behind.
    if (row.last_step or 0) < row.progress.get("step", 0):
        return envelope_of_series(session, row.id)
    return (
        LossEnvelope()
        if row.width is None
        else LossEnvelope.of_row(row.width, row.last_step, from_json(row.train_loss))
    )


def differing(jobs: Iterable[ComparedJob]) -> dict[str, list[Any]]:
    """The names in `values` that differ between jobs, in the order of the config, each with its distinct values in the
    order of the jobs."""
    values: dict[str, dict[str, Any]] = {}
    for job in jobs:
        for name, value in job.values.items():
            values.setdefault(name, {}).setdefault(repr(value), value)
    return {name: list(found.values()) for name, found in values.items() if len(found) > 1}
