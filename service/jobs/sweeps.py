"""What is read of sweeps: the rows, how far their jobs are, their events. Changes nothing."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session, col, select

from service.database.database import Database
from service.database.schema import table
from service.errors import NotFound
from service.jobs.statuses import STATUSES, TERMINAL, Status
from service.jobs.tables import Checkpoint, Event, Job, Sweep, Worker
from service.jobs.workers import is_alive

RECENT_JOBS = 20
"""How many of the jobs that succeeded last tell how fast jobs are trained."""

_jobs = table(Job)
_events = table(Event)
_checkpoints = table(Checkpoint)

_PROGRESS = (
    _jobs.c.id,
    _jobs.c.status,
    _jobs.c.progress,
    _jobs.c.total_steps,
    _jobs.c.n_active_params,
    _jobs.c.started_at,
    _jobs.c.finished_at,
)


@dataclass(frozen=True)
class SweepProgress:
    """How far the jobs of a sweep are."""

    job_ids: list[str]
    """The jobs in the order of submission."""

    step: int
    total_steps: int | None
    percent: float
    eta_seconds: float | None


def get_sweep(db: Database, sweep_id: str) -> tuple[Sweep, dict[Status, int], SweepProgress]:
    """A sweep, how many of its jobs have each status, and how far they are. Raises NotFound `sweep_not_found`."""
    with db.read() as session:
        sweep = load_sweep(session, sweep_id)
        rows = session.execute(sa.select(*_PROGRESS).where(_jobs.c.sweep_id == sweep_id).order_by(_jobs.c.seq)).all()
    counts: dict[Status, int] = dict.fromkeys(STATUSES, 0)
    for row in rows:
        counts[row.status] += 1
    return sweep, counts, _progress(rows)


def load_sweep(session: Session, sweep_id: str) -> Sweep:
    """The sweep of that id, within a transaction. Raises NotFound `sweep_not_found`."""
    sweep = session.get(Sweep, sweep_id)
    if sweep is None:
        raise NotFound("sweep_not_found", f"there is no sweep {sweep_id!r}")
    return sweep


def list_sweeps(db: Database, *, before: int | None = None, limit: int = 50) -> list[tuple[Sweep, dict[Status, int]]]:
    """The newest sweeps first, each with how many of its jobs have each status. `before` is the `seq` of the last one
    of the page before, so inserts do not shift pages."""
    query = select(Sweep).order_by(col(Sweep.seq).desc()).limit(limit)
    if before is not None:
        query = query.where(col(Sweep.seq) < before)
    with db.read() as session:
        found = session.exec(query).all()
        by_status = session.execute(
            sa.select(_jobs.c.sweep_id, _jobs.c.status, sa.func.count())
            .where(_jobs.c.sweep_id.in_([sweep.id for sweep in found]))
            .group_by(_jobs.c.sweep_id, _jobs.c.status)
        ).all()
    counts: dict[str, dict[Status, int]] = {sweep.id: dict.fromkeys(STATUSES, 0) for sweep in found}
    for sweep_id, status, n in by_status:
        counts[sweep_id][status] = n
    return [(sweep, counts[sweep.id]) for sweep in found]


def status_of(counts: Mapping[Status, int]) -> Status:
    """The status of a sweep whose jobs have these: the first that fits of running, queued, paused, failed, cancelled,
    succeeded. Once one of its jobs has ended, a sweep with queued ones is running."""
    if counts["running"] or (counts["queued"] and any(counts[status] for status in TERMINAL)):
        return "running"
    order: tuple[Status, ...] = ("queued", "paused", "failed", "cancelled")
    return next((status for status in order if counts[status]), "succeeded")


def _progress(rows: Sequence[Any]) -> SweepProgress:
    steps = [row.progress.get("step", 0) for row in rows]
    totals = [row.total_steps for row in rows]
    done = [100.0 if row.status in TERMINAL else row.progress.get("percent", 0.0) for row in rows]
    return SweepProgress(
        job_ids=[row.id for row in rows],
        step=sum(steps),
        total_steps=None if None in totals else sum(totals),
        percent=round(statistics.fmean(done), 2) if done else 100.0,
        eta_seconds=_eta_seconds(rows),
    )


def _eta_seconds(rows: Sequence[Any]) -> float | None:
    """Seconds until all have ended, if as many run at once as now, each step takes as long for each active parameter as
    those that were done, and nothing else is claimed between them. None where nothing runs, or none has been timed."""
    left = [row for row in rows if row.status not in TERMINAL]
    if not left:
        return 0.0
    running = [row for row in left if row.status == "running"]
    if not running or any(row.status == "paused" for row in left):
        return None
    rates = [rate for row in rows if (rate := _seconds_per_work(row)) is not None]
    needed = [_needed_seconds(row, statistics.fmean(rates) if rates else None) for row in left]
    known = [seconds for seconds in needed if seconds is not None]
    if len(known) < len(needed):
        return None
    # The last to end is one of those that take longest, however the others are shared out.
    return max(sum(known) / len(running), *known)


def _work(row: Any, steps: int | None) -> float | None:
    return None if steps is None or row.n_active_params is None else float(steps * row.n_active_params)


def _seconds_per_work(row: Any) -> float | None:
    """Seconds for a step and an active parameter, of a job that has succeeded or runs."""
    step, eta = row.progress.get("step", 0), row.progress.get("eta_seconds")
    if row.status == "succeeded" and (work := _work(row, step)):
        return float((row.finished_at - row.started_at).total_seconds()) / work
    if row.status == "running" and eta and row.total_steps and (work := _work(row, row.total_steps - step)):
        return float(eta) / work
    return None


def _needed_seconds(row: Any, rate: float | None) -> float | None:
    """Seconds that the rest of a job takes: as it reports itself, else at `rate`."""
    eta = row.progress.get("eta_seconds")
    if row.status == "running" and eta is not None:
        return float(eta)
    steps = None if row.total_steps is None else row.total_steps - row.progress.get("step", 0)
    work = _work(row, steps)
    return None if work is None or rate is None else work * rate


# Events


def events_end(db: Database, sweep_id: str) -> tuple[int, bool]:
    """The number of the newest event of a sweep's jobs, and whether all of them have ended.

    Raises NotFound `sweep_not_found`.
    """
    with db.read() as session:
        sweep = load_sweep(session, sweep_id)
        unfinished = _jobs.c.status.not_in(TERMINAL)
        left = session.scalar(sa.select(_jobs.c.id).where(_jobs.c.sweep_id == sweep_id, unfinished).limit(1))
        return sweep.event_seq, left is None


@dataclass(frozen=True)
class SweepEvent:
    """An event of a job of a sweep."""

    number: int
    """Its number in the sweep."""

    job_id: str
    kind: str
    data: dict[str, Any]
    """Data of the event; of a checkpoint its figures."""


def events_after(db: Database, sweep_id: str, number: int, limit: int = 1000) -> list[SweepEvent]:
    """The next `limit` events of a sweep's jobs past `number`, oldest first. Reads no reconstruction."""
    next_ones = (
        sa.select(_events)
        .where(_events.c.sweep_id == sweep_id, _events.c.sweep_seq > number)
        .order_by(_events.c.sweep_seq)
        .limit(limit)
    )
    with db.read() as session:
        rows = session.execute(next_ones).all()
        found = _checkpoints_of(session, [row for row in rows if row.kind == "checkpoint"])
    return [
        SweepEvent(row.sweep_seq, row.job_id, row.kind, found.get((row.job_id, row.data.get("percent")), row.data))
        for row in rows
    ]


def _checkpoints_of(session: Session, events: Sequence[Any]) -> dict[tuple[str, Any], dict[str, Any]]:
    """The figures of the checkpoints that these events are about."""
    if not events:
        return {}
    c = _checkpoints.c
    of_jobs = c.job_id.in_({event.job_id for event in events})
    rows = session.execute(sa.select(c.job_id, c.percent, c.step, c.epoch, c.created_at, c.metrics).where(of_jobs))
    return {
        (row.job_id, row.percent): row.metrics
        | {"percent": row.percent, "step": row.step, "epoch": row.epoch, "created_at": row.created_at}
        for row in rows
    }


# Predicting


@dataclass(frozen=True)
class Pace:
    """How fast this installation trains."""

    seconds_per_work: float
    """Seconds for a step and an active parameter, the median of the jobs that succeeded last."""

    n_slots: int
    """Slots of the workers that are alive."""


def measure_pace(db: Database) -> Pace | None:
    """How fast jobs are trained; None before one has succeeded, or while no worker is alive."""
    with db.read() as session:
        newest = sa.select(*_PROGRESS).where(_jobs.c.status == "succeeded").order_by(_jobs.c.seq.desc())
        rows = session.execute(newest.limit(RECENT_JOBS)).all()
        now = session.scalars(sa.select(db.now)).one()
        n_slots = sum(worker.slots for worker in session.scalars(sa.select(Worker)) if is_alive(worker, now))
    rates = [rate for row in rows if (rate := _seconds_per_work(row)) is not None]
    return Pace(statistics.median(rates), n_slots) if rates and n_slots else None


def predict_seconds(work: Sequence[float | None], pace: Pace | None) -> float | None:
    """Seconds from the first start to the last end of jobs with this much work, in steps times active parameters; None
    where that would be a guess."""
    known = [one * pace.seconds_per_work for one in work if one is not None] if pace is not None else []
    if pace is None or len(known) < len(work):
        return None
    return max(sum(known) / pace.n_slots, *known)
