"""When to look for leases that have passed."""

from datetime import datetime, timedelta

from service.database.database import Database
from service.jobs.queue import rescue
from service.jobs.tables import Job


class Rescuer:
    """Calls `rescue` once an interval, except right after a laptop has slept or a clock was set: every lease looks past
    then, and one interval later living workers have renewed theirs."""

    def __init__(self, db: Database, interval_seconds: float) -> None:
        self._db = db
        self._longest = timedelta(seconds=2 * interval_seconds)
        self._last: datetime | None = None

    def round(self) -> list[Job]:
        """Call `rescue`; returns the jobs that changed their status. Skipped when the last call was more than two
        intervals ago by the database's clock, or in its future."""
        now = self._db.time()
        last, self._last = self._last, now
        if last is not None and not timedelta(0) <= now - last <= self._longest:
            return []
        return rescue(self._db)
