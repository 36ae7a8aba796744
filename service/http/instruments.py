"""The service's Prometheus metrics. Knows no route.

Each API has a registry of its own. Metrics of the database are queried at each scrape; those of generation are counted
where it happens (`service.generation.instruments`).
"""

import time
from collections.abc import Iterator
from datetime import datetime

from prometheus_client import ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.database.database import Database
from service.generation.instruments import GenerationInstruments
from service.jobs import reads
from service.jobs.queue_position import LongestWait, find_longest_wait
from service.jobs.statuses import Status
from service.jobs.workers import is_alive, list_workers

_clock = time.monotonic
"""Clock of this module, which a test can replace without the event loop's."""

_COUNT_SECONDS = 5.0
"""Seconds for which the counts of all jobs are cached: with a million jobs the query takes a second."""


class DatabaseCollector(Collector):
    """Metrics of the database at each scrape: jobs, queue, workers, training."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counted: tuple[float, dict[Status, int], LongestWait] | None = None
        self._ahead_since: float | None = None
        """Monotonic time since which every scrape found a queued job whose submission time lies in the future."""

    def describe(self) -> list[Metric]:
        """No metrics: registering must not query the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The current metrics. Raises DatabaseUnavailable."""
        counts, wait = self._count_jobs()
        jobs = GaugeMetricFamily("nanomoe_jobs", "Jobs by status.", labels=["status"])
        for status, n in counts.items():
            jobs.add_metric([status], n)
        yield jobs
        now = self._database.time()
        yield GaugeMetricFamily(
            "nanomoe_queue_age_seconds",
            "How long the job that is due longest has waited.",
            self._queue_age(wait, now),
        )
        alive = [(row, running) for row, running in list_workers(self._database) if is_alive(row, now)]
        yield GaugeMetricFamily("nanomoe_workers", "Workers with a recent heartbeat.", len(alive))
        yield GaugeMetricFamily(
            "nanomoe_worker_slots",
            "Jobs, or cohorts of jobs, that the alive workers can train at once.",
            sum(row.slots for row, _ in alive),
        )
        speed = sum(job.progress.get("tok_per_sec") or 0.0 for _, running in alive for job in running)
        yield GaugeMetricFamily("nanomoe_training_tokens_per_second", "Training speed, all jobs together.", speed)

    def _queue_age(self, wait: LongestWait, now: datetime) -> float:
        """Age of the oldest due job, in seconds. One submitted by a clock that was ahead counts from its first
        scrape."""
        if not wait.clock_was_ahead:
            self._ahead_since = None
        elif self._ahead_since is None:
            self._ahead_since = _clock()
        ages = [(now - wait.since).total_seconds()] if wait.since is not None else []
        ages += [_clock() - self._ahead_since] if self._ahead_since is not None else []
        return max(0.0, *ages) if ages else 0.0

    def _count_jobs(self) -> tuple[dict[Status, int], LongestWait]:
        now = _clock()
        if self._counted is None or now - self._counted[0] > _COUNT_SECONDS:
            self._counted = now, reads.count_jobs(self._database), find_longest_wait(self._database)
        return self._counted[1:]


def expose(instruments: GenerationInstruments, database: Database) -> None:
    """Register the metrics of the database and of this process."""
    instruments.registry.register(DatabaseCollector(database))
    ProcessCollector(registry=instruments.registry)
