"""How fast this installation trains, and how it would train jobs that are not submitted yet: which of them together,
and in how much time. Reads, and changes nothing.

Of the seconds of a cohort each of its jobs has an equal share. How much company saves depends on the shape and the
device, so that a time is only predicted for cohorts of about a size that was measured.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from service.database.database import Database
from service.database.schema import table
from service.jobs.forecast import Slot, Waiting, claims, slots_of
from service.jobs.quotas import most_running
from service.jobs.tables import Job, Worker
from service.jobs.workers import is_alive

RECENT_JOBS = 20
"""How many of the jobs that succeeded last tell how fast jobs are trained, alone and in cohorts of each size."""

LOOKED_THROUGH = 200
"""How many of the jobs that succeeded last are looked through for them."""

MOST_SIZE_RATIO = 2.0
"""Most times by which the sizes of two cohorts may differ for one's time to be predicted from the other's. Assumed."""

_jobs = table(Job)


@dataclass(frozen=True)
class Pace:
    """How fast this installation trains, and what would be free for the jobs of the caller if nothing ran."""

    seconds_per_work: Mapping[int, float]
    """Seconds for a step and an active parameter by how many jobs are trained together, 1 for a job alone, each job's
    share of them: the median of those that succeeded last in their first attempt. Empty before one has."""

    slots: Sequence[Slot]
    """Slots of the workers that are alive; none where there is no such worker."""

    def seconds(self, work: Sequence[float | None]) -> float | None:
        """How long jobs with this much work take together, in steps times active parameters; None where that would be a
        guess."""
        rate = self._rate(len(work))
        return None if rate is None or None in work else rate * len(work) * max(one for one in work if one is not None)

    def _rate(self, size: int) -> float | None:
        # A job by itself is done in another way than a cohort of two.
        measured = [one for one in self.seconds_per_work if (one == 1) == (size == 1)]
        nearest = min(measured, key=lambda one: max(one / size, size / one), default=None)
        if nearest is None or max(nearest / size, size / nearest) > MOST_SIZE_RATIO:
            return None
        return self.seconds_per_work[nearest]


@dataclass(frozen=True)
class Planned:
    """A job that is not submitted yet. None stands for what only the start of training decides."""

    cohort_key: str | None
    training_bytes: int | None
    total_steps: int | None
    n_active_params: int | None


@dataclass(frozen=True)
class Prediction:
    """How jobs would be trained that are submitted at once, if nothing else ran."""

    together: list[int | None]
    """For each job how many are trained with it, itself included; None where no worker is alive that has the memory."""

    seconds: float | None
    """Seconds from the first start to the last end; None where that would be a guess."""

    seconds_alone: float | None
    """The same if each job were trained by itself."""


def measure_pace(db: Database) -> Pace:
    """How fast the jobs were trained that succeeded last, and the slots of the workers that are alive, none wider than
    the caller's quota of running jobs."""
    newest = (
        sa.select(
            _jobs.c.cohort_size, _jobs.c.progress, _jobs.c.n_active_params, _jobs.c.started_at, _jobs.c.finished_at
        )
        .where(_jobs.c.status == "succeeded", _jobs.c.attempt == 1)
        .order_by(_jobs.c.seq.desc())
        .limit(LOOKED_THROUGH)
    )
    with db.read() as session:
        rows = session.execute(newest).all()
        now = session.scalars(sa.select(db.now)).one()
        workers = [worker for worker in session.scalars(sa.select(Worker)) if is_alive(worker, now)]
        most = most_running(session)
    rates: dict[int, list[float]] = {}
    for row in rows:
        size = row.cohort_size or 1
        if (rate := _seconds_per_work(row)) is not None and len(rates.setdefault(size, [])) < RECENT_JOBS:
            rates[size].append(rate / size)
    slots = [slot for worker in workers for slot in slots_of(worker)]
    for slot in slots:
        slot.width = slot.width if most is None else max(1, min(slot.width, most))
    return Pace({size: statistics.median(found) for size, found in rates.items()}, slots)


def _seconds_per_work(row: Any) -> float | None:
    """Seconds for a step and an active parameter of a job that has succeeded, from its claim to its end."""
    work = (row.n_active_params or 0) * row.progress.get("step", 0)
    return (row.finished_at - row.started_at).total_seconds() / work if work else None


def predict(jobs: Sequence[Planned], pace: Pace) -> Prediction:
    """How jobs would be trained that are submitted together, in this order."""
    together, seconds = _run(jobs, pace, pace.slots)
    if all(slot.width == 1 for slot in pace.slots):
        return Prediction(together, seconds, seconds)
    _, seconds_alone = _run(jobs, pace, [replace(slot, width=1) for slot in pace.slots])
    return Prediction(together, seconds, seconds_alone)


def _run(jobs: Sequence[Planned], pace: Pace, slots: Sequence[Slot]) -> tuple[list[int | None], float | None]:
    """How many are trained with each of the jobs, and the seconds in all."""
    line = [
        Waiting(
            id=str(n),
            cohort_key=job.cohort_key,
            steps_left=None if job.total_steps is None else max(1, job.total_steps),
            training_bytes=job.training_bytes,
        )
        for n, job in enumerate(jobs)
    ]

    work = [
        None if job.total_steps is None or job.n_active_params is None else float(job.total_steps * job.n_active_params)
        for job in jobs
    ]
    is_known = True

    def seconds_of(members: Sequence[Waiting]) -> float:
        nonlocal is_known
        needed = pace.seconds([work[int(one.id)] for one in members])
        is_known &= needed is not None
        return 1.0 if needed is None else needed  # those behind are claimed in an order all the same

    together: list[int | None] = [None] * len(jobs)
    end = 0.0
    for claimed in claims(line, [replace(slot) for slot in slots], seconds_of):
        end = max(end, claimed.seconds + (claimed.needed or 0.0))
        for one in claimed.members:
            together[int(one.id)] = len(claimed.members)
    return together, end if is_known and None not in together else None
