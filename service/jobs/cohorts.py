"""Which queued jobs are claimed together, to be trained by one trainer as one program. Reads and locks rows, and
changes nothing (`queue.py`); and the same rule as arithmetic, for jobs whose turn has not come (`forecast.py`).

A cohort is the first job in line with those behind it, in the order of the line, that are of its shape and priority and
have about as much work left. Jobs of other shapes wait for no longer than its longest member takes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlmodel import Session

from service.jobs.claim_order import CLAIM_ORDER, jobs
from service.jobs.quotas import places_left

_Found = TypeVar("_Found")
_Candidate = TypeVar("_Candidate", bound="Candidate")

_MEMORY_FOR_COMPANY = 2
"""Jobs are claimed together as far as half of a slot's memory holds them: `training_bytes` is the least that each
needs, with a micro-batch of one window where that is allowed, and the processes need some themselves. The factor is
assumed; where it is too small, a cohort that runs out of memory is halved."""

MOST_RATIO = 2
"""Most times by which the steps that are left to two members of a cohort may differ from those of its first job. In a
step all members have equally many tokens."""

_ON_A_CPU = jobs.c.execution["device"].as_string() == "cpu"
_MAY_HAVE_COMPANY = jobs.c.execution.is_(None) | sa.case(
    (_ON_A_CPU, jobs.c.execution["n_threads"].as_integer() == 1),
    else_=jobs.c.execution["path"].as_string() == "stacked",
)
"""Whether a job may have company: one that began with several threads of a CPU, or on a GPU with steps of its own, goes
on so, by itself."""

_AFTER_PROGRESS = jobs.c.total_steps - sa.func.coalesce(jobs.c.progress["step"].as_integer(), 0)
_STEPS_LEFT = sa.case((_AFTER_PROGRESS <= 1, 1), else_=_AFTER_PROGRESS)
"""Steps that a job still has to do, 1 at least: after the last one there may be its evaluation left. Null where the
number of its steps is not known."""

CANDIDATE = (
    jobs.c.id,
    jobs.c.owner,
    jobs.c.priority,
    jobs.c.training_bytes,
    jobs.c.cohort_key,
    jobs.c.cohort_most,
    _STEPS_LEFT.label("steps_left"),
    _MAY_HAVE_COMPANY.label("may_have_company"),
)
"""The columns of a `Candidate`."""


@dataclass(frozen=True)
class Candidate:
    """A job in line, as far as it decides with which others it is claimed. The defaults are those of a job that has
    just been submitted."""

    id: str
    cohort_key: str | None
    steps_left: int | None
    """1 at least; None where the number of its steps is not known."""

    training_bytes: int | None = None
    owner: str = ""
    priority: int = 0
    cohort_most: int | None = None
    may_have_company: bool = True


def company(first: _Candidate, others: Iterable[_Candidate], width: int, memory_bytes: int | None) -> list[_Candidate]:
    """The first job in line, and those of the `others` behind it that `lock_cohort` would claim with it, if their
    owners may run as many as they like."""
    width = min(width, first.cohort_most or width)
    if width == 1 or first.cohort_key is None or first.steps_left is None or not first.may_have_company:
        return [first]
    fitting = (other for other in others if other.id != first.id and _go_together(first, other, width))
    return list(_within([first, *islice(fitting, width - 1)], {}, memory_bytes))


def _go_together(first: Candidate, other: Candidate, width: int) -> bool:
    """The condition of `lock_cohort`'s statement."""
    return (
        other.cohort_key == first.cohort_key
        and other.priority == first.priority
        and other.may_have_company
        and (other.cohort_most or width) >= width
        and first.steps_left is not None
        and other.steps_left is not None
        and first.steps_left <= other.steps_left * MOST_RATIO
        and first.steps_left * MOST_RATIO >= other.steps_left
    )


def lock_cohort(
    session: Session, fits: sa.ColumnElement[bool], width: int, memory_bytes: int | None
) -> Sequence[sa.Row[Any]]:
    """Lock the next job in line and up to `width` - 1 more that are claimed with it, those passed over that another
    claim has locked; their rows in the order of the line, none where nothing waits.

    `fits`: which jobs may be claimed. `memory_bytes`: what all of them together may need. Of an owner no more are taken
    than may run.
    """
    line = sa.select(*CANDIDATE).where(fits).order_by(*CLAIM_ORDER).limit(1)
    first = session.execute(line.with_for_update(skip_locked=True, key_share=True)).one_or_none()
    if first is None:
        return []
    width = min(width, first.cohort_most or width)
    if width == 1 or first.cohort_key is None or first.steps_left is None or not first.may_have_company:
        return [first]
    company = (
        sa.select(*CANDIDATE)
        .where(
            fits,
            jobs.c.cohort_key == first.cohort_key,
            jobs.c.priority == first.priority,
            jobs.c.id != first.id,
            _MAY_HAVE_COMPANY,
            sa.func.coalesce(jobs.c.cohort_most, width) >= width,
            first.steps_left <= _STEPS_LEFT * MOST_RATIO,
            first.steps_left * MOST_RATIO >= _STEPS_LEFT,
        )
        .order_by(jobs.c.seq)
        .limit(width - 1)
        .with_for_update(skip_locked=True, key_share=True)
    )
    found = [first, *session.execute(company)]
    owners = sorted({row.owner for row in found} - {""})
    places = {owner: session.scalar(sa.select(places_left(sa.literal(owner)))) for owner in owners}
    return list(_within(found, places, memory_bytes))


def _within(found: Sequence[_Found], places: Mapping[str, int | None], memory_bytes: int | None) -> Iterator[_Found]:
    """The first of these jobs, and of the others as many as their owners may run and the memory holds."""
    taken: Counter[str] = Counter()
    needed = 0
    for one in found:
        row: Any = one
        most = places.get(row.owner)
        needed += row.training_bytes or 0
        if taken and memory_bytes is not None and needed > memory_bytes / _MEMORY_FOR_COMPANY:
            return
        if taken and most is not None and taken[row.owner] >= most:
            continue
        taken[row.owner] += 1
        yield one
