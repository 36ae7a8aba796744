"""How long the worker waits for what: every interval and patience in one place, in seconds."""

from dataclasses import dataclass
from typing import Self

from service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The defaults are the product's; tests shorten them."""

    lease: float = 60.0
    """A job without a heartbeat for this long may be claimed by another worker."""

    heartbeat: float = 10.0
    rescue: float = 15.0
    sweep: float = 3600.0
    """Between two looks for files that no row refers to; they are removed a day after they were written."""

    record: float = 0.5
    """Between two commits of step figures."""

    look: float = 0.1
    """Between two looks at what the user wishes of a running job, when the database changes all the time."""

    cancel_grace: float = 5.0
    """From asking to killing a trainer whose work is not wanted any more."""

    stop_grace: float = 30.0
    """From asking to killing a trainer that should leave a snapshot: a pause, a drain."""

    exit_grace: float = 5.0
    """From a trainer's last word to killing what has not ended by itself."""

    stall: float = 1800.0
    """A trainer is stalled after this long without progress, or after `stall_steps` median steps if that is longer."""

    stall_steps: int = 20
    retry: float = 1.0
    """Before something that failed is tried again: a database out of reach, a lock that is held."""

    start: float = 300.0
    """A trainer that has not imported torch by then is started anew."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What the settings say."""
        return cls(
            lease=settings.lease_seconds,
            heartbeat=settings.heartbeat_seconds,
            rescue=settings.rescue_seconds,
        )

    @property
    def certain(self) -> float:
        """How long after a heartbeat a lease counts as ours: then the trainer is killed, before others may claim."""
        return 0.75 * self.lease

    @property
    def silence(self) -> float:
        """How long after a heartbeat a trainer that hears nothing ends itself: before others may claim, but later than
        `certain`, so that a supervisor that lives, and only waits for the database, is the one that ends it."""
        return 0.9 * self.lease

    @property
    def beat(self) -> float:
        """Between two beats to a trainer."""
        return min(5.0, self.certain / 4)

    @property
    def guard(self) -> float:
        """Between two looks at the deadlines."""
        return min(0.25, self.lease / 60)
