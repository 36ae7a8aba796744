"""The envelope of a job's training loss: minimum and maximum in at most 100 buckets, kept as the job goes.

A chart of a thousand jobs reads a thousand rows of it, whatever the number of steps. Buckets are a power of two steps
wide, so that those of different jobs begin at the same steps; when there would be more than 100, each two become one.
Knows no job status; whoever writes holds the job's fence.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import sqlalchemy as sa
from sqlmodel import Session

from service.database.schema import table
from service.database.upsert import insert_or_update
from service.jobs.tables import Envelope, Step

MAX_BUCKETS = 100

_steps = table(Step)
_envelopes = table(Envelope)

Figure = float | None


@dataclass
class LossEnvelope:
    """The smallest and the largest training loss in each bucket of a job's steps, with five significant digits."""

    width: int = 1
    """Steps of a bucket: bucket b holds the steps b * width + 1 to (b + 1) * width."""

    last_step: int = 0
    """The last step that is in it."""

    low: list[Figure] = field(default_factory=list)
    high: list[Figure] = field(default_factory=list)
    """Extremes by bucket; None in one without a finite loss."""

    @classmethod
    def of_row(cls, width: int, last_step: int, train_loss: Sequence[list[Figure]]) -> Self:
        """The envelope that a row of the table holds."""
        low, high = train_loss
        return cls(width, last_step, list(low), list(high))

    def add(self, steps: Iterable[tuple[int, Figure]]) -> None:
        """Add steps and their finite losses, ascending. A step that was added before is harmless."""
        for step, loss in steps:
            while step > MAX_BUCKETS * self.width:
                self.double()
            bucket = (step - 1) // self.width
            missing = bucket + 1 - len(self.low)
            self.low += [None] * missing
            self.high += [None] * missing
            if loss is not None:
                rounded = float(f"{loss:.5g}")
                self.low[bucket] = _or(min, self.low[bucket], rounded)
                self.high[bucket] = _or(max, self.high[bucket], rounded)
            self.last_step = max(self.last_step, step)

    def double(self) -> None:
        """Make one bucket of each two."""
        self.width *= 2
        self.low = _pairs(min, self.low)
        self.high = _pairs(max, self.high)

    def cut(self, step: int) -> int:
        """Forget the steps past `step`, and all of the bucket in which it lies. Returns the last step that is left."""
        whole = min(step, self.last_step) // self.width
        self.low, self.high = self.low[:whole], self.high[:whole]
        self.last_step = min(self.last_step, whole * self.width)
        return self.last_step


def _or(choose: Any, known: Figure, new: Figure) -> Figure:
    return new if known is None else known if new is None else choose(known, new)


def _pairs(choose: Any, figures: list[Figure]) -> list[Figure]:
    padded = figures + [None] * (len(figures) % 2)
    return [_or(choose, one, other) for one, other in zip(padded[::2], padded[1::2], strict=True)]


def widen_envelopes(session: Session, steps: Mapping[str, Sequence[tuple[int, Figure]]]) -> None:
    """Add a batch of steps of each of these jobs, by job id, which are in the series already, to its envelope."""
    envelopes = _load(session, list(steps))
    for job_id, added in steps.items():
        envelope = envelopes[job_id]
        if added[0][0] > envelope.last_step + 1:  # an earlier version wrote steps without it
            _add_stored(session, job_id, envelope, added[0][0] - 1)
        envelope.add(added)
    _store(session, envelopes)


def cut_envelope(session: Session, job_id: str, step: int) -> None:
    """Take the steps past `step` out of the envelope; those up to it are in the series."""
    envelope = _load(session, [job_id])[job_id]
    envelope.cut(step)
    _add_stored(session, job_id, envelope, step)
    _store(session, {job_id: envelope})


def envelope_of_series(session: Session, job_id: str) -> LossEnvelope:
    """The envelope computed from the series itself: of a job whose row is missing or behind."""
    envelope = LossEnvelope()
    _add_stored(session, job_id, envelope, None)
    return envelope


def _load(session: Session, job_ids: Sequence[str]) -> dict[str, LossEnvelope]:
    """The envelope of each of these jobs; an empty one where there is no row."""
    query = sa.select(_envelopes.c.job_id, _envelopes.c.width, _envelopes.c.last_step, _envelopes.c.train_loss)
    rows = session.execute(query.where(_envelopes.c.job_id.in_(job_ids)))
    stored = {job_id: LossEnvelope.of_row(*row) for job_id, *row in rows}
    return {job_id: stored.get(job_id) or LossEnvelope() for job_id in job_ids}


def _add_stored(session: Session, job_id: str, envelope: LossEnvelope, last: int | None) -> None:
    """Add the steps of the series past the envelope's end, up to `last`."""
    query = sa.select(_steps.c.step, _steps.c.train_loss).where(
        _steps.c.job_id == job_id, _steps.c.step > envelope.last_step
    )
    if last is not None:
        query = query.where(_steps.c.step <= last)
    envelope.add((step, loss) for step, loss in session.execute(query.order_by(_steps.c.step)))


def _store(session: Session, envelopes: Mapping[str, LossEnvelope]) -> None:
    rows = [
        {
            "job_id": job_id,
            "width": envelope.width,
            "last_step": envelope.last_step,
            "train_loss": [envelope.low, envelope.high],
        }
        for job_id, envelope in envelopes.items()
    ]
    insert_or_update(session, Envelope, rows)
