"""What is read of sweeps: the rows, and how far their jobs are. Changes nothing."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session, col, select

from service.database.database import Database
from service.database.schema import table
from service.errors import NotFound
from service.jobs.ownership import is_visible, visible_sweeps
from service.jobs.statuses import STATUSES, TERMINAL, Status
from service.jobs.tables import Job, Sweep

_jobs = table(Job)

_PROGRESS = (
    _jobs.c.id,
    _jobs.c.status,
    _jobs.c.progress,
    _jobs.c.total_steps,
    _jobs.c.n_active_params,
    _jobs.c.started_at,
    _jobs.c.finished_at,
    _jobs.c.cohort_id,
    _jobs.c.cohort_size,
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
    """The sweep of that id, within a transaction. Raises NotFound `sweep_not_found`, for one that is another's, too."""
    sweep = session.get(Sweep, sweep_id)
    if sweep is None or not is_visible(session, sweep):
        raise NotFound("sweep_not_found", f"there is no sweep {sweep_id!r}")
    return sweep


def list_sweeps(db: Database, *, before: int | None = None, limit: int = 50) -> list[tuple[Sweep, dict[Status, int]]]:
    """The newest sweeps first, each with how many of its jobs have each status. `before` is the `seq` of the last one
    of the page before, so inserts do not shift pages."""
    query = select(Sweep).order_by(col(Sweep.seq).desc()).limit(limit)
    if before is not None:
        query = query.where(col(Sweep.seq) < before)
    with db.read() as session:
        found = session.exec(query.where(visible_sweeps(session))).all()
        counts = count_by_status(session, [sweep.id for sweep in found])
    return [(sweep, counts[sweep.id]) for sweep in found]


def count_by_status(session: Session, sweep_ids: Sequence[str]) -> dict[str, dict[Status, int]]:
    """How many jobs of each of these sweeps have each status, within a transaction; every status is a key."""
    by_status = session.execute(
        sa.select(_jobs.c.sweep_id, _jobs.c.status, sa.func.count())
        .where(_jobs.c.sweep_id.in_(sweep_ids))
        .group_by(_jobs.c.sweep_id, _jobs.c.status)
    ).all()
    counts: dict[str, dict[Status, int]] = {sweep_id: dict.fromkeys(STATUSES, 0) for sweep_id in sweep_ids}
    for sweep_id, status, n in by_status:
        counts[sweep_id][status] = n
    return counts


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
    """Seconds until all have ended, if as many slots train them as now, each step takes as long for each active
    parameter as those that were done, in company as large, and nothing else is claimed between them. None where nothing
    runs, or none has been timed."""
    left = [row for row in rows if row.status not in TERMINAL]
    if not left:
        return 0.0
    running = [row for row in left if row.status == "running"]
    if not running or any(row.status == "paused" for row in left):
        return None
    # Of the time of a cohort each of its jobs has an equal share.
    slots = Counter(_slot(row) for row in running)
    sizes = {row.id: slots[_slot(row)] if row.status == "running" else row.cohort_size or 1 for row in rows}
    rates = {row.id: rate for row in rows if (rate := _seconds_per_work(row)) is not None}
    rate = statistics.fmean(rates.values()) if rates else None
    share = statistics.fmean(found / sizes[job_id] for job_id, found in rates.items()) if rates else None
    longest = [_needed_seconds(row, rate) for row in left]
    shares = [
        seconds / sizes[row.id] if row.status == "running" and seconds is not None else _needed_seconds(row, share)
        for row, seconds in zip(left, longest, strict=True)
    ]
    known = [seconds for seconds in longest if seconds is not None]
    if len(known) < len(left):
        return None
    # The last to end is one of those that take longest, however the others are shared out.
    return max(sum(seconds for seconds in shares if seconds is not None) / len(slots), *known)


def _slot(row: Any) -> str:
    """What the jobs have in common that one trainer trains together."""
    return str(row.cohort_id or row.id)


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


def has_ended(db: Database, sweep_id: str) -> bool:
    """Whether all jobs of a sweep have ended. Raises NotFound `sweep_not_found`."""
    with db.read() as session:
        load_sweep(session, sweep_id)
        unfinished = _jobs.c.status.not_in(TERMINAL)
        left = session.scalar(sa.select(_jobs.c.id).where(_jobs.c.sweep_id == sweep_id, unfinished).limit(1))
        return left is None
