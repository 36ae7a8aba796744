"""The events of many jobs in the order of their numbers, read so that none is skipped. Changes nothing.

On PostgreSQL a transaction may have taken a number and not have committed yet: past it nothing can be read before that
is known to have ended. `SettledNumbers` knows: an INSERT locks the table of events, in a mode that hinders nobody,
before it takes a number and until its transaction ends. So once every transaction has ended that held such a lock when
a number was the newest, all events up to that number are there that ever will be. It depends on no transaction that
writes no event, nor on one in another database of the server.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from service.database.database import Database, caller_of
from service.database.schema import table
from service.jobs.claim_order import RUNNING
from service.jobs.ownership import visible_jobs
from service.jobs.sweeps import load_sweep
from service.jobs.tables import EVENT_COUNTER, Checkpoint, Counter, Event, Job

_jobs = table(Job)
_events = table(Event)
_checkpoints = table(Checkpoint)
_counters = table(Counter)

_NEWEST_IN_SEQUENCE = sa.text("SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END FROM event_numbers")

_WRITERS = sa.text(
    "SELECT virtualtransaction FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database "
    "WHERE locktype = 'relation' AND datname = current_database() "
    "AND relation = 'events'::regclass AND mode = 'RowExclusiveLock'"
)
"""The transactions that write events."""


class SettledNumbers:
    """Up to which number all events are committed, or will never be. Only grows."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._settled: int | None = None
        self._next = 0
        self._writers: set[str] = set()
        """Transactions that may have taken numbers up to `_next`, and had not ended when last looked at."""

    def look(self) -> int | None:
        """The newest settled number; None while none is known. Events are read in a transaction that begins later."""
        with self._db.read() as session:
            newest, writers = _newest_and_writers(self._db, session)
        if self._writers:
            self._writers &= writers
            if self._writers:
                return self._settled
            self._settled = self._next
        if writers:
            self._next, self._writers = newest, writers
        else:
            self._settled = newest
        return self._settled

    @property
    def is_behind(self) -> bool:
        """Whether a transaction is waited for: the next look may find more, though nothing announces it."""
        return bool(self._writers)


def _newest_and_writers(db: Database, session: Session) -> tuple[int, set[str]]:
    """The newest number that was taken, and then the transactions that may have taken one."""
    if db.is_sqlite:
        return session.scalars(sa.select(_counters.c.value).where(_counters.c.name == EVENT_COUNTER)).one(), set()
    newest: int = session.execute(_NEWEST_IN_SEQUENCE).scalar_one()
    return newest, set(session.scalars(_WRITERS))


@dataclass(frozen=True, kw_only=True)
class EventFilter:
    """The jobs whose events are read: those of a sweep, with a tag, or all."""

    sweep_id: str | None = None
    tag: tuple[str, str | None] | None = None
    """Key of a tag, which must have no quotes, and its value; None stands for any value."""

    def check(self, db: Database) -> None:
        """Raises NotFound `sweep_not_found`."""
        if self.sweep_id is not None:
            with db.read() as session:
                load_sweep(session, self.sweep_id)

    def of_events(self) -> list[sa.ColumnElement[bool]]:
        """The conditions on the table of events."""
        of_sweep = [] if self.sweep_id is None else [_events.c.sweep_id == self.sweep_id]
        tagged = sa.exists().where(_jobs.c.id == _events.c.job_id, *self._tagged())
        return of_sweep if self.tag is None else [*of_sweep, tagged]

    def of_jobs(self) -> list[sa.ColumnElement[bool]]:
        """The conditions on the table of jobs."""
        of_sweep = [] if self.sweep_id is None else [_jobs.c.sweep_id == self.sweep_id]
        return of_sweep + self._tagged()

    def _tagged(self) -> list[sa.ColumnElement[bool]]:
        if self.tag is None:
            return []
        key, value = self.tag
        stored: sa.ColumnElement[Any] = _jobs.c.tags[key].as_string()
        return [stored.is_not(None) if value is None else stored == value]


@dataclass(frozen=True)
class NumberedEvent:
    """An event among those of many jobs."""

    number: int
    job_id: str
    kind: str
    data: dict[str, Any]
    """Data of the event; of a checkpoint its figures."""


@dataclass(frozen=True)
class JobProgress:
    """How far a running job is."""

    job_id: str
    total_steps: int | None
    progress: dict[str, Any]


def read_events(
    db: Database, after: int, until: int, wanted: EventFilter, *, limit: int = 1000
) -> tuple[list[NumberedEvent], list[JobProgress]]:
    """The next `limit` events past number `after` and up to `until`, in order, and the progress of running jobs at the
    same moment. Reads no reconstruction."""
    next_ones = (
        sa.select(_events)
        .where(_events.c.number > after, _events.c.number <= until, *wanted.of_events())
        .order_by(_events.c.number)
        .limit(limit)
    )
    at_work = sa.select(_jobs.c.id, _jobs.c.total_steps, _jobs.c.progress).where(RUNNING, *wanted.of_jobs())
    with db.read() as session:
        if not caller_of(session).sees_all:
            visible = visible_jobs(session)
            next_ones = next_ones.where(sa.exists().where(_jobs.c.id == _events.c.job_id, visible))
            at_work = at_work.where(visible)
        rows = session.execute(next_ones).all()
        found = _checkpoints_of(session, [row for row in rows if row.kind == "checkpoint"])
        progress = [JobProgress(*row) for row in session.execute(at_work)]
    events = [
        NumberedEvent(row.number, row.job_id, row.kind, found.get((row.job_id, row.data.get("percent")), row.data))
        for row in rows
    ]
    return events, progress


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


class EventReader:
    """Reads the events of many jobs in order, from one call to the next."""

    def __init__(self, db: Database, wanted: EventFilter, after: int | None) -> None:
        """`after`: the number to read after; None begins with the next event that is written."""
        self._db = db
        self._wanted = wanted
        self._settled = SettledNumbers(db)
        self._after = after
        self.position: int | None = None
        """The number up to which all is read; None until it is known where to begin."""

        self.has_more = False
        """Whether the last call left events that can be read at once."""

    @property
    def is_behind(self) -> bool:
        """Whether an event may have been written that cannot be read yet: look again soon."""
        return self._settled.is_behind

    def begin(self) -> bool:
        """Find out where to begin. False while it is not known yet: call it again soon."""
        self._look()
        return self.position is not None

    def read(self, limit: int = 1000) -> tuple[list[NumberedEvent], list[JobProgress]]:
        """The next `limit` events, and how far the running jobs are."""
        settled = self._look()
        if settled is None or self.position is None:
            return [], []
        events, progress = read_events(self._db, self.position, settled, self._wanted, limit=limit)
        self.has_more = len(events) == limit
        self.position = events[-1].number if self.has_more else settled
        return events, progress

    def _look(self) -> int | None:
        settled = self._settled.look()
        if settled is not None and self.position is None:  # a number that was never given is another database's
            self.position = settled if self._after is None else min(self._after, settled)
        return settled


def last_number(db: Database, sweep_id: str) -> int:
    """The number of the newest event of a sweep's jobs; 0 without any."""
    newest = sa.select(sa.func.coalesce(sa.func.max(_events.c.number), 0)).where(_events.c.sweep_id == sweep_id)
    with db.read() as session:
        number: int = session.scalars(newest).one()
    return number
