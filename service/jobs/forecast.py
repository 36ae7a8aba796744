"""Which jobs will be claimed together, and when: free slots claim from the line by the rules of `queue.py`. Arithmetic
only; nothing is read.

Owners' quotas are left out: when another owner's jobs will have made way is not known.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from service.jobs.cohorts import Candidate, company
from service.jobs.tables import Worker


@dataclass(frozen=True)
class Waiting(Candidate):
    """A job in line."""

    ready_in: float = 0.0
    """Seconds until it may be claimed."""


@dataclass
class Slot:
    """A slot of a worker that is alive."""

    memory_bytes: int | None = None
    """Memory for one job; None fits all."""

    cohort_bytes: int | None = None
    """Memory for the jobs of a cohort together."""

    width: int = 1
    """Most jobs that it trains together."""

    free_in: float | None = 0.0
    """Seconds until the slot is free; None when its job has not reported it, infinite when it cannot be estimated."""

    def fits(self, job: Candidate) -> bool:
        """Whether the worker has the memory for the job."""
        return self.memory_bytes is None or job.training_bytes is None or job.training_bytes <= self.memory_bytes


@dataclass(frozen=True)
class Claimed:
    """Jobs that are claimed together."""

    seconds: float
    """Seconds from now until then."""

    members: Sequence[Waiting]
    needed: float | None
    """Seconds that they take together; None where that is not known."""


def slots_of(worker: Worker) -> list[Slot]:
    """The slots of a worker, as if all of them were free."""
    memory = min((device["memory_bytes"] for device in worker.devices), default=None)
    of_a_slot = None if memory is None else memory // worker.slots
    width = max((device.get("cohort", 1) for device in worker.devices), default=1)
    return [Slot(memory, of_a_slot, width) for _ in range(worker.slots)]


def claims(
    line: Sequence[Waiting], slots: Sequence[Slot], seconds_of: Callable[[Sequence[Waiting]], float | None]
) -> Iterator[Claimed]:
    """What the slots claim, in the order in which they claim it, as far as that can be told; each slot is free again
    when what it has claimed has ended. Jobs that no slot has the memory for are left out.

    `line`: in the order of the line. `seconds_of`: how long jobs take that are trained together; None where that is not
    known. Changes `free_in` of the slots.
    """
    left = {job.id: job for job in line if any(slot.fits(job) for slot in slots)}
    by_shape: dict[tuple[str | None, int], dict[str, Waiting]] = {}
    for job in left.values():
        by_shape.setdefault((job.cohort_key, job.priority), {})[job.id] = job
    any_is_unknown = any(slot.free_in is None for slot in slots)
    while left:
        seconds, slot, first = _next_claim(left, slots)
        # A slot of unknown time may be free at any moment, though not before those that are free now.
        if slot is None or first is None or (seconds > 0 and any_is_unknown):
            return
        alike = by_shape[first.cohort_key, first.priority]
        others = (job for job in alike.values() if job.ready_in <= seconds and slot.fits(job))
        members = company(first, others, slot.width, slot.cohort_bytes)
        for job in members:
            del left[job.id], alike[job.id]
        needed = seconds_of(members)
        slot.free_in = math.inf if needed is None else seconds + needed
        yield Claimed(seconds, members, needed)


def _next_claim(left: dict[str, Waiting], slots: Sequence[Slot]) -> tuple[float, Slot | None, Waiting | None]:
    """Which slot claims next, in how many seconds, and the first job that it claims; infinite and None where that is
    unknown, or no job fits."""
    found: tuple[float, Slot | None, Waiting | None] = math.inf, None, None
    known = ((slot.free_in, slot) for slot in slots if slot.free_in is not None)
    for free_in, slot in sorted(known, key=lambda one: one[0]):
        if free_in >= found[0]:  # nor can those that are free later be the first
            break
        fitting = (job for job in left.values() if slot.fits(job))
        ready = (job for job in left.values() if job.ready_in <= free_in and slot.fits(job))
        job = next(ready, None) or min(fitting, key=lambda job: job.ready_in, default=None)
        if job is not None and (seconds := max(free_in, job.ready_in)) < found[0]:
            found = seconds, slot, job
    return found
