"""The Prometheus metrics of generation. Knows no request."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class GenerationInstruments:
    """Counters and gauges of generation, in a registry of their own."""

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
