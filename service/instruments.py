"""What the service counts about itself, as Prometheus reads it. Knows no route.

Each API has a registry of its own. What is in the database is read when somebody asks; what generation does is counted
where it happens (`service.generation`).
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service import store
from service.database import Database

_COUNT_SECONDS = 5.0
"""How long a count of the jobs is told again: with a million of them it takes a second."""


class GenerationInstruments:
    """What the API counts of generation."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.tokens = Counter(
            "nanomoe_generation_tokens", "Tokens read and generated.", ["kind"], registry=self.registry
        )
        self.requests = Counter(
            "nanomoe_generation_requests", "Generation requests, by how they ended.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "nanomoe_generation_first_token_seconds", "From a request's arrival to its first token.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30), registry=self.registry,
        )  # fmt: skip
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)
        self.cached = Gauge(
            "nanomoe_generation_cached_checkpoints", "Checkpoints that are kept loaded.", registry=self.registry
        )
        self.cache_bytes = Gauge(
            "nanomoe_generation_cache_bytes", "Bytes of the checkpoints that are kept loaded.", registry=self.registry
        )
        self.waiting = Gauge("nanomoe_generation_waiting", "Requests that have not begun.", registry=self.registry)
        self.running = Gauge("nanomoe_generation_running", "Requests that have begun.", registry=self.registry)


class DatabaseCollector(Collector):
    """What the tables tell: jobs, the queue, workers, training."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counted: tuple[float, dict[str, int]] | None = None

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Raises DatabaseUnavailable."""
        jobs = GaugeMetricFamily("nanomoe_jobs", "Jobs by status.", labels=["status"])
        for status, n in self._count_jobs().items():
            jobs.add_metric([status], n)
        yield jobs
        now = self._database.time()
        oldest = store.next_queued_at(self._database)
        age = max(0.0, (now - oldest).total_seconds()) if oldest is not None else 0.0
        yield GaugeMetricFamily("nanomoe_queue_age_seconds", "How long the job that is due longest has waited.", age)
        alive = [(row, running) for row, running in store.list_workers(self._database) if store.is_alive(row, now)]
        yield GaugeMetricFamily("nanomoe_workers", "Workers seen lately.", len(alive))
        yield GaugeMetricFamily(
            "nanomoe_worker_slots", "Jobs they can train at once.", sum(row.slots for row, _ in alive)
        )
        speed = sum(job.progress.get("tok_per_sec") or 0.0 for _, running in alive for job in running)
        yield GaugeMetricFamily("nanomoe_training_tokens_per_second", "Training speed, all jobs together.", speed)

    def _count_jobs(self) -> dict[str, int]:
        now = time.monotonic()
        if self._counted is None or now - self._counted[0] > _COUNT_SECONDS:
            self._counted = now, store.count_jobs(self._database)
        return self._counted[1]


def expose(instruments: GenerationInstruments, database: Database) -> None:
    """Add what the database and the operating system tell to a registry."""
    instruments.registry.register(DatabaseCollector(database))
    ProcessCollector(registry=instruments.registry)
