"""Waiting until a job's row shows what a benchmark measures the time of."""

import time
from collections.abc import Callable

from service.cli.bench.temporary_service import TemporaryService
from service.client import JobHandle
from service.jobs import reads
from service.jobs.tables import Job

_POLL_SECONDS = 0.002
_TIMEOUT_SECONDS = 300.0


def wait(service: TemporaryService, job: JobHandle, until_row: Callable[[Job], bool]) -> float:
    """The monotonic time at which the condition first held for the row. Raises AssertionError after a time-out."""
    return until(
        lambda: until_row(reads.get_job(service.database, job.id)), f"job {job.id} did not reach the expected state"
    )


def until(holds: Callable[[], bool], otherwise: str) -> float:
    """The monotonic time at which the condition first held. Raises AssertionError after a time-out."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(_POLL_SECONDS)
    return time.monotonic()


def cancel(service: TemporaryService, job: JobHandle) -> float:
    """Cancel a job; the monotonic time at which its row says so."""
    job.cancel()
    return wait(service, job, lambda row: row.status == "cancelled")


def has_trained(row: Job) -> bool:
    """Whether a training step of the job has been recorded."""
    step: int = row.progress.get("step", 0)
    return step > 0


def has_succeeded(row: Job) -> bool:
    """Whether the job has succeeded. Raises AssertionError where it failed."""
    assert row.status != "failed", f"job {row.id} failed"
    return row.status == "succeeded"
