"""The trainer that one or several attempts share, a single one or the members of a cohort, and what they have in
common: the process, the slot's lock, and its end.

Each leaves by itself, at the trainer's `Done` about its job; the last one waits until the trainer is idle, or until it
is proved that no process of it is left. Knows no database and no job.
"""

import threading
from collections.abc import Sequence

import structlog

from worker.held_lease import Lease
from worker.lock import SlotLock
from worker.process import TrainerProcess
from worker.protocol import Assignment, Start, Stop, StopReason

log = structlog.get_logger(__name__)


class Company:
    """A trainer, and the attempts that share it. The slot's thread uses it; `members_here` and `kill` are for any."""

    def __init__(self, trainer: TrainerProcess, lock: SlotLock, leases: Sequence[Lease]) -> None:
        """`lock`: the slot's, taken for these jobs. `leases`: one for each."""
        self.trainer = trainer
        self._lock = lock
        self._has_begun = False
        self._stops: list[Stop] = []
        """Requests to stop that came before the trainer was given its jobs."""
        self._says_idle = False
        self.trainer_is_idle = False
        """Whether the trainer has outlived its jobs, with nothing of them left: it can be given the next ones."""
        self._mutex = threading.Lock()
        self._interrupted_by: Assignment | None = None
        self.members = [Member(self, lease) for lease in leases]
        self.members_here = tuple(self.members)
        """Those whose jobs the trainer may still have."""

    def begin(self, starts: Sequence[Start]) -> None:
        """Give the trainer its jobs."""
        self._has_begun = True
        self.trainer.train(starts, self._lock)
        for stop in self._stops:
            self.trainer.send(stop)

    def idle(self) -> None:
        """Take note that the trainer says that nothing of its jobs is left."""
        self._says_idle = True

    def end(self, timeout: float) -> bool:
        """Return True once nothing of the jobs is left: the trainer is idle, and no process lives that it started; or
        none of its processes lives. False after `timeout` seconds. A trainer that is not idle is killed."""
        self._lock.close()  # this process's copy, which it has unless the trainer was given its jobs
        if (self._says_idle or not self._has_begun) and self.trainer.is_alone():
            self.trainer_is_idle = True
        elif not self.trainer.kill_and_reap(timeout):
            return False
        self.members_here = ()
        return True

    def kill(self, because_of: Assignment) -> None:
        """Kill the trainer, because of one member alone: no crash of the others. Thread-safe."""
        with self._mutex:
            if self._interrupted_by is None:
                self._interrupted_by = because_of
        self.trainer.kill()

    def was_interrupted_for(self, member: "Member") -> bool:
        """Whether the trainer was killed because of another member alone."""
        return self._interrupted_by not in (None, member.assignment)

    def stop(self, stop: Stop) -> None:
        """Ask the trainer to leave a job at the next step boundary."""
        if self._has_begun:
            self.trainer.send(stop)
            self.trainer.wake()
        else:
            self._stops.append(stop)

    def leave(self, member: "Member") -> None:
        """The trainer has left this member's job, and goes on with others."""
        self.members_here = tuple(other for other in self.members_here if other is not member)


class Member:
    """The trainer, as one of the attempts sees it that share it."""

    def __init__(self, company: Company, lease: Lease) -> None:
        self._company = company
        self.lease = lease
        self.assignment = Assignment(lease.claim.job_id, lease.claim.fence)
        self.pid = company.trainer.pid

    @property
    def is_here(self) -> bool:
        """Whether the trainer may still have the job."""
        return self in self._company.members_here

    @property
    def is_alone(self) -> bool:
        """Whether the trainer can have no other job."""
        return all(other is self for other in self._company.members_here)

    @property
    def exit_status(self) -> int:
        """Exit status of the trainer once `Company.end` has found it dead."""
        return self._company.trainer.exit_status

    @property
    def was_interrupted(self) -> bool:
        """Whether the trainer was killed because of another member alone."""
        return self._company.was_interrupted_for(self)

    def stop(self, reason: StopReason) -> None:
        """Ask the trainer to leave the job at the next step boundary."""
        self._company.stop(Stop(assignment=self.assignment, reason=reason))

    def leave(self) -> None:
        """The trainer has left the job, and goes on with others."""
        self._company.leave(self)

    def kill(self) -> None:
        """Kill the trainer with all of its jobs, because of this one."""
        self._company.kill(self.assignment)

    def kill_as_crashed(self) -> None:
        """Kill the trainer, for a cause that may lie with any of its jobs."""
        self._company.trainer.kill()
