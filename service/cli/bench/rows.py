"""Waiting until a job's row shows what a benchmark measures the time of."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from service.cli.bench.temporary_service import TemporaryService
from service.client import JobHandle
from service.database.database import Database, driver_connection
from service.errors import Conflict
from service.jobs import queue, reads
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Job

_POLL_SECONDS = 0.002
_TIMEOUT_SECONDS = 300.0


def wait(service: TemporaryService, job: JobHandle, until_row: Callable[[Job], bool]) -> float:
    """The monotonic time at which the condition first held for the row. Raises AssertionError after a time-out."""
    with _commits(service.database) as has_changed:
        return until(
            lambda: has_changed() and until_row(reads.get_job(service.database, job.id)),
            f"job {job.id} did not reach the expected state",
        )


@contextmanager
def _commits(database: Database) -> Iterator[Callable[[], bool]]:
    """Asks whether somebody may have committed since the last time: on SQLite a hundredth of the work of reading a row,
    which would take a third of a processor from what is measured."""
    if not database.is_sqlite:
        yield lambda: True
        return
    with database.engine.connect() as connection:
        driver, seen = driver_connection(connection), None

        def has_changed() -> bool:
            nonlocal seen
            before, (seen,) = seen, driver.execute("PRAGMA data_version").fetchone()
            return bool(seen != before)

        yield has_changed


def until(holds: Callable[[], bool], otherwise: str, most_seconds: float | None = None) -> float:
    """The monotonic time at which the condition first held. Raises AssertionError after a time-out."""
    deadline = time.monotonic() + (_TIMEOUT_SECONDS if most_seconds is None else most_seconds)
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(_POLL_SECONDS)
    return time.monotonic()


def cancel(service: TemporaryService, job: JobHandle) -> float:
    """Cancel a job; the monotonic time at which its row says so."""
    job.cancel()
    return wait(service, job, lambda row: row.status == "cancelled")


def end(service: TemporaryService, job: JobHandle) -> None:
    """Cancel a job if it has not ended, and wait until it has."""
    with suppress(Conflict):
        queue.request_cancel(service.database, job.id)
    wait(service, job, lambda row: row.status in TERMINAL)


def has_trained(row: Job) -> bool:
    """Whether a training step of the job has been recorded."""
    step: int = row.progress.get("step", 0)
    return step > 0


def has_succeeded(row: Job) -> bool:
    """Whether the job has succeeded. Raises AssertionError where it failed."""
    assert row.status != "failed", f"job {row.id} failed"
    return row.status == "succeeded"
