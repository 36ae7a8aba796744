"""A claim that is kept alive: every write to the job goes through it, and it knows until when the job is ours.

Knows neither the trainer nor the job's meaning. A database that is out of reach is tried again for as long as the lease
is certain; the supervisor's guard ends the trainer at the deadline, which no write here can outlive.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from service.errors import DatabaseUnavailable, StorageFull
from service.jobs.lease import Claim
from worker.timing import Timing

log = structlog.get_logger(__name__)

T = TypeVar("T")


class LeaseUncertain(Exception):
    """No heartbeat succeeded for so long that the trainer was killed: others may soon claim the job."""


class Lease:
    """The right to write to a job, with its time."""

    def __init__(self, claim: Claim, began: float, timing: Timing) -> None:
        """`began`: monotonic time before the claim was asked for, so that we err on the side of too short."""
        self.claim = claim
        self._timing = timing
        self.fenced = threading.Event()
        """Set by the guard when it has killed the trainer."""
        self._extend(began)

    def _extend(self, began: float) -> None:
        self.deadline = began + self._timing.certain
        """Monotonic time at which the guard kills the trainer."""
        self.trainer_until = began + self._timing.silence
        """Monotonic time at which the trainer ends itself unless it hears of a later one."""
        self.heartbeat_due = began + self._timing.heartbeat
        """Monotonic time of the next heartbeat, if nothing else is written before."""

    @property
    def is_uncertain(self) -> bool:
        """Whether the deadline has passed, or the guard has already acted on it."""
        return self.fenced.is_set() or time.monotonic() > self.deadline

    def write(self, write: Callable[[], T]) -> T:
        """Do one fenced write, which is a heartbeat too; try again while the database is out of reach.

        Raises LeaseLost when the job is somebody else's, LeaseUncertain when the guard has killed the trainer
        meanwhile, StorageFull.
        """
        while True:
            began = time.monotonic()
            try:
                result = write()
            except DatabaseUnavailable as error:
                log.warning("database_out_of_reach", job=self.claim.job_id, error=str(error))
                if self.fenced.wait(self._timing.retry):
                    raise LeaseUncertain from error
            else:
                if self.fenced.is_set():
                    raise LeaseUncertain
                self._extend(began)
                return result

    def read(self, read: Callable[[], T]) -> T:
        """Do one read; try again while the database is out of reach. Raises LeaseUncertain as `write` does."""
        while True:
            try:
                return read()
            except DatabaseUnavailable as error:
                log.warning("database_out_of_reach", job=self.claim.job_id, error=str(error))
                if self.fenced.wait(self._timing.retry):
                    raise LeaseUncertain from error

    def insist(self, write: Callable[[], T], give_up: threading.Event) -> T | None:
        """Do the last write of an attempt, whose trainer is dead: there is nothing left to lose by trying on.

        None when `give_up` was set while the database was out of reach or full: the lease then runs out by itself.
        Raises LeaseLost.
        """
        while True:
            try:
                return write()
            except (DatabaseUnavailable, StorageFull) as error:
                log.warning("database_out_of_reach", job=self.claim.job_id, error=str(error))
                if give_up.wait(self._timing.retry):
                    return None
