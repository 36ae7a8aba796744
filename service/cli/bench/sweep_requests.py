"""How long the requests about a sweep of many jobs take, through HTTP, and how large their answers are.

Nothing is trained: steps and checkpoints are recorded as a worker does it, with made-up figures.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from nanomoe.config import PERCENTS
from service.cli.bench.temporary_service import TemporaryService
from service.database.database import Database
from service.database.schema import table
from service.jobs import queue
from service.jobs.lease import Claim
from service.jobs.queue import Finish
from service.jobs.series import write_steps
from service.jobs.tables import Checkpoint
from service.jobs.workers import WorkerIdentity, worker_started, worker_stopped

N_JOBS = 1000
"""Jobs of the sweep: as many as one may have."""

N_STEPS = 1000
"""Steps of each."""

_AT_ONCE = 50
"""Jobs that are claimed, recorded and ended together."""

_LEASE_SECONDS = 3600.0
_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class RequestTime:
    """One request about a sweep."""

    request: str
    """Method and route."""

    median_seconds: float
    """From the request sent to the response read."""

    max_seconds: float
    n_bytes: int
    """Size of the response's body."""


@dataclass(frozen=True)
class SweepTimes:
    """The requests about sweeps of one size."""

    n_jobs: int
    n_steps: int
    requests: list[RequestTime]


def measure(service: TemporaryService, turns: int) -> SweepTimes:
    """Create a sweep of `N_JOBS`, pause, resume, cancel and delete it, `turns` times; then compare one whose jobs have
    succeeded. There must be no other job."""
    with httpx.Client(base_url=service.url, timeout=_TIMEOUT_SECONDS) as http:
        times = [*_lives(http, turns), *_comparisons(http, service.database, turns)]
    return SweepTimes(N_JOBS, N_STEPS, times)


def _lives(http: httpx.Client, turns: int) -> list[RequestTime]:
    taken: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}

    def timed(name: str, ask: Callable[[], httpx.Response]) -> httpx.Response:
        began = time.perf_counter()
        answer = ask()
        taken.setdefault(name, []).append(time.perf_counter() - began)
        sizes[name] = len(answer.raise_for_status().content)
        return answer

    for _ in range(turns):
        timed("POST /sweeps?dry_run=true", lambda: http.post("/sweeps", json=_body(), params={"dry_run": True}))
        path = f"/sweeps/{timed('POST /sweeps', lambda: http.post('/sweeps', json=_body())).json()['id']}"
        for action in ("pause", "resume", "cancel"):
            timed(f"POST /sweeps/{{sweep_id}}/{action}", partial(http.post, f"{path}/{action}"))
        timed("DELETE /sweeps/{sweep_id}", partial(http.delete, path))
    return [_time(name, seconds, sizes[name]) for name, seconds in taken.items()]


def _comparisons(http: httpx.Client, db: Database, turns: int) -> list[RequestTime]:
    sweep_id = http.post("/sweeps", json=_body()).raise_for_status().json()["id"]
    _succeed_all(db)
    found = []
    for path in ("/compare", "/compare/series"):
        taken, size = [], 0
        for _ in range(turns):
            began = time.perf_counter()
            size = len(http.get(path, params={"sweep": sweep_id}).raise_for_status().content)
            taken.append(time.perf_counter() - began)
        found.append(_time(f"GET {path}", taken, size))
    return found


def _body() -> dict[str, Any]:
    rates = [round(1e-4 * 1.05**n, 8) for n in range(100)]
    return {"text": "Era uma vez um pequeno modelo.", "grid": {"lr": rates}, "seeds": N_JOBS // len(rates)}


def _succeed_all(db: Database) -> None:
    """Claim every job of the line, and record of each what a training records."""
    worker = WorkerIdentity(name="bench")
    worker_started(db, worker)
    while claims := queue.claim_jobs(db, worker, _LEASE_SECONDS, _AT_ONCE):
        with db.write() as session:
            write_steps(session, {claim.job_id: _steps(claim) for claim in claims})
            session.execute(table(Checkpoint).insert(), [row for claim in claims for row in _checkpoints(db, claim)])
        queue.finish_jobs(db, [Finish(claim, "succeeded") for claim in claims])
    worker_stopped(db, worker.id)


def _steps(claim: Claim) -> dict[str, list[Any]]:
    seed = claim.job.seq % 7
    steps = list(range(1, N_STEPS + 1))
    losses = [5 * math.exp(-step / 300) + 0.01 * ((step * 31 + seed) % 17) for step in steps]
    return {"step": steps, "train_loss": losses, "lr": [1e-4] * N_STEPS, "grad_norm": [1.0] * N_STEPS}


def _checkpoints(db: Database, claim: Claim) -> list[dict[str, Any]]:
    now = db.time()
    rows = []
    for percent in PERCENTS:
        loss = 5 * math.exp(-percent * N_STEPS / 30_000)
        metrics = {"percent": percent, "step": percent * N_STEPS // 100, "epoch": percent, "loss": loss}
        metrics |= {"perplexity": math.exp(loss), "bits_per_byte": loss / 2, "accuracy": 0.5, "tok_per_sec": 4000.0}
        row: dict[str, Any] = {"job_id": claim.job_id, "fence": claim.fence, "percent": percent}
        row |= {"step": metrics["step"], "epoch": percent, "created_at": now}
        row |= {"folder": "none", "manifest_sha256": "0" * 64, "files": [], "n_bytes": 0}
        rows.append(row | {"metrics": metrics, "reconstruction": None, "moe": None})
    return rows


def _time(request: str, taken: Sequence[float], n_bytes: int) -> RequestTime:
    return RequestTime(request, statistics.median(taken), max(taken), n_bytes)
