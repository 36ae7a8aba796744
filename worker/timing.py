"""Every interval, deadline and grace period of the worker in one place, in seconds."""

from dataclasses import dataclass
from typing import Self

from service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The worker's intervals and deadlines, in seconds. Tests shorten them."""

    lease: float = 60.0
    """Time without a heartbeat after which another worker may claim a job."""

    heartbeat: float = 10.0
    """Time between two heartbeats of a running job."""

    rescue: float = 15.0
    """Time between two searches for jobs whose lease has expired."""

    sweep: float = 3600.0
    """Time between two searches for files that no row refers to; they are removed a day after they were written."""

    record: float = 0.5
    """Shortest time between two commits of step figures."""

    poll: float = 0.1
    """Shortest time between two reads of a running job's cancel and pause requests."""

    cancel_grace: float = 5.0
    """Time from asking a trainer to stop for a cancellation to killing it."""

    stop_grace: float = 30.0
    """Time from asking a trainer to stop with a snapshot, for a pause or a drain, to killing it."""

    exit_grace: float = 5.0
    """Time from a trainer's final message to killing the process if it has not exited."""

    stall: float = 1800.0
    """Time without progress after which a trainer counts as stalled, or `stall_steps` median steps if that is
    longer."""

    stall_steps: int = 20
    """Number of median step times without progress that a trainer has at least before it counts as stalled."""

    retry: float = 1.0
    """Delay before a retry: of a database that is out of reach, of a lock that is held."""

    start: float = 300.0
    """Time in which a trainer must have imported torch before it is replaced."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The product's timing with the lease, heartbeat and rescue intervals of the settings."""
        return cls(
            lease=settings.lease_seconds,
            heartbeat=settings.heartbeat_seconds,
            rescue=settings.rescue_seconds,
        )

    @property
    def kill_after(self) -> float:
        """Time after the last heartbeat at which the supervisor kills the trainer, before another worker may claim."""
        return 0.75 * self.lease

    @property
    def self_kill_after(self) -> float:
        """Time after the last heartbeat at which a trainer without a keep-alive kills itself: before another worker may
        claim, but after `kill_after`, so that a living supervisor that waits for the database kills it first."""
        return 0.9 * self.lease

    @property
    def keep_alive(self) -> float:
        """Time between two keep-alives to a trainer."""
        return min(5.0, self.kill_after / 4)

    @property
    def tick(self) -> float:
        """Time between two passes of the supervisor's main loop, which checks the deadlines."""
        return min(0.25, self.lease / 60)
