"""How long a sweep takes through the service with its jobs trained together, at several widths, and what that costs:
the trainer's memory, transactions, and the time that a job of another shape waits behind it.

Each width has a service and a worker of its own, which has trained one job of the shape before. Times are those of the
rows.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanomoe.config import JobConfig
from service.cli.bench import rows
from service.cli.bench.peak_memory import PeakMemory
from service.cli.bench.temporary_service import TemporaryService, run_service
from service.cli.bench.turnaround import TINY
from service.client import Client
from service.jobs import reads, sweeps
from service.jobs.tables import Job

SHAPES = {
    "reference": JobConfig(),
    "narrow-bytes": JobConfig(n_embd=64, tokenizer="bytes"),
}
"""The reference run's shape; and one of half its channels, on bytes, of which little is the output layer."""

_MOST_SECONDS = 3600.0
"""After which a sweep has failed."""


@dataclass(frozen=True)
class CohortRate:
    """One sweep."""

    shape: str
    n_jobs: int
    n_steps: int
    """Steps of each job."""

    width: int
    """Most jobs that were trained together."""

    seconds: float
    """From the claim of the first job to the end of the last one."""

    jobs_per_minute: float
    times_as_fast: float | None
    """Seconds of the sweep whose jobs were trained one after another over these; None where that was not measured."""

    transactions_per_job: float
    """Writing transactions of the worker from its start to its end, all of its own and the first job's among them, over
    the number of jobs."""

    peak_bytes: int | None
    """Most memory that the trainer and its forks have had together during the sweep, as the sum of their proportional
    set sizes (PSS), looked at five times a second; None where the system does not tell. A GPU's is not in it."""

    seconds_behind: float
    """From the submission to the claim of a job of another shape that was submitted right after the sweep."""


def measure(
    shapes: Sequence[str],
    widths: Sequence[int],
    *,
    n_jobs: int,
    steps: int,
    said: Callable[[str], None] = lambda _: None,
) -> list[CohortRate]:
    """Measure a sweep of `n_jobs` of each shape at each width, the smallest first. `steps`: of each job. `said` is told
    what has been measured."""
    found: list[CohortRate] = []
    for name in shapes:
        alone: float | None = None
        for width in sorted(widths):
            rate = _measure(name, width, n_jobs, steps, alone)
            if width == 1:
                alone = rate.seconds
            found.append(rate)
            said(f"{name}, {width} together: {rate.jobs_per_minute:,.1f} jobs a minute")
    return found


def _measure(name: str, width: int, n_jobs: int, steps: int, alone: float | None) -> CohortRate:
    """`alone`: seconds of the same sweep with one job after another, where they are known."""
    config = SHAPES[name].model_copy(update={"max_steps": steps})
    with run_service(cohort=width, log_format="json") as service:
        service.processes.start_worker()
        peak = PeakMemory()
        with Client(service.url) as client, peak.watching(service.processes.pid("worker")):
            done, behind = _sweep(service, client, config, n_jobs)
        n_transactions = _transactions(service)
    first = min(job.started_at for job in done if job.started_at is not None)
    last = max(job.finished_at for job in done if job.finished_at is not None)
    seconds = (last - first).total_seconds()
    assert behind.started_at is not None
    return CohortRate(
        shape=name,
        n_jobs=n_jobs,
        n_steps=steps,
        width=width,
        seconds=seconds,
        jobs_per_minute=60 * n_jobs / seconds,
        times_as_fast=None if alone is None else alone / seconds,
        transactions_per_job=n_transactions / n_jobs,
        peak_bytes=peak.n_bytes,
        seconds_behind=(behind.started_at - behind.created_at).total_seconds(),
    )


def _sweep(service: TemporaryService, client: Client, config: JobConfig, n_jobs: int) -> tuple[list[Job], Job]:
    """The ended jobs of a sweep, and the one behind it."""
    from nanomoe.bench.models import paragraph

    rows.wait(service, client.submit(paragraph(), config), rows.has_succeeded)
    sweep = client.sweep(paragraph(), config=config, seeds=n_jobs)
    other = client.submit(paragraph(), TINY)
    rows.until(
        lambda: sweeps.has_ended(service.database, sweep.id),
        f"the sweep did not end in {_MOST_SECONDS:.0f} s",
        most_seconds=_MOST_SECONDS,
    )
    rows.wait(service, other, rows.has_succeeded)
    _, counts, progress = sweeps.get_sweep(service.database, sweep.id)
    assert counts["succeeded"] == n_jobs, f"of {n_jobs} jobs {counts['succeeded']} succeeded"
    done = [reads.get_job(service.database, job_id) for job_id in progress.job_ids]
    return done, reads.get_job(service.database, other.id)


def _transactions(service: TemporaryService) -> int:
    """The writing transactions of the worker, which ends."""
    service.processes.stop("worker")
    for line in reversed(service.processes.log_tail("worker").splitlines()):
        if "worker_stopped" in line:
            n: int = json.loads(line)["transactions"]
            return n
    raise AssertionError("the worker did not say how many transactions it has made")
