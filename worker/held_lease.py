"""The lease of a claimed job, which every write to the job renews: it knows its own deadline.

Knows neither the trainer nor the job's content. A write to a database that is out of reach is retried until the
deadline, at which the supervisor's main thread kills the trainer; no write is accepted after that.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from service.errors import DatabaseUnavailable
from service.jobs.lease import Claim
from worker.timing import Timing

log = structlog.get_logger(__name__)

T = TypeVar("T")


class LeaseUncertain(Exception):
    """The deadline has passed without a heartbeat: the trainer was killed, and another worker may soon claim the
    job."""


class Lease:
    """The time-limited right to write to a job."""

    def __init__(self, claim: Claim, began: float, timing: Timing) -> None:
        """`began`: monotonic time before the claim was requested, so that an error makes the lease shorter, not
        longer."""
        self.claim = claim
        self._timing = timing
        self.fenced = threading.Event()
        """Set by the supervisor's main thread when it has killed the trainer at the deadline."""
        self._extend(began)

    def _extend(self, began: float) -> None:
        self.deadline = began + self._timing.kill_after
        """Monotonic time at which the supervisor's main thread kills the trainer."""
        self.trainer_until = began + self._timing.self_kill_after
        """Monotonic time at which the trainer kills itself unless a keep-alive names a later one."""
        self.heartbeat_due = began + self._timing.heartbeat
        """Monotonic time of the next heartbeat, if nothing else is written before."""

    @property
    def is_uncertain(self) -> bool:
        """Whether the deadline has passed, or the trainer was already killed because of it."""
        return self.fenced.is_set() or time.monotonic() > self.deadline

    def renewed(self, began: float) -> None:
        """Take note of a write that has renewed it. `began`: monotonic time before that write.

        Raises LeaseUncertain when the trainer was killed at the deadline meanwhile.
        """
        if self.fenced.is_set():
            raise LeaseUncertain
        self._extend(began)

    def read(self, read: Callable[[], T]) -> T:
        """Do one read; retry while the database is out of reach.

        Raises LeaseUncertain when the trainer was killed at the deadline meanwhile.
        """
        while True:
            try:
                return read()
            except DatabaseUnavailable as error:
                log.warning("database_out_of_reach", job=self.claim.job_id, error=str(error))
                if self.fenced.wait(self._timing.retry):
                    raise LeaseUncertain from error
