"""Benchmarks of a job's life cycle, on a temporary service.

Latencies are measured from outside: from the request sent to the row that shows its effect.
"""

import concurrent.futures
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import sqlalchemy as sa

from nanomoe.config import JobConfig
from service.cli.bench import rows
from service.cli.bench.fill import fill
from service.cli.bench.temporary_service import TemporaryService, run_service
from service.client import Client, JobHandle
from service.database.database import Database
from service.jobs import queue, reads
from service.jobs.claim_order import QUEUED, jobs
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity, list_workers, worker_started

_CLAIMS = 30
_CLIENTS = 4
_LONG = 100_000
"""Epochs of a job that is still training when it is cancelled."""


@dataclass(frozen=True)
class ClaimTime:
    """Duration of a claim with a number of queued jobs."""

    n_queued: int
    median_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Traffic:
    """Rate of submissions by four clients at once, and the latency that a fifth client has meanwhile."""

    training: bool
    """Whether a job was training meanwhile."""

    submits_per_sec: float
    get_p50_seconds: float
    """Median time of `GET /jobs/{id}`."""

    get_p99_seconds: float


@dataclass(frozen=True)
class Delays:
    """Latencies on an idle, warm worker; each as the median and maximum of several jobs."""

    n_jobs: int
    submit_to_running: tuple[float, float]
    submit_to_first_step: tuple[float, float]
    """Seconds from the request sent to the first training step in the row."""

    cancel_to_cancelled: tuple[float, float]
    """Seconds from the request sent until no process of the job is left and the row says so."""

    cancel_to_next_first_step: tuple[float, float]
    """Seconds from the request sent to the first training step of the next queued job."""


@dataclass(frozen=True)
class Recovery:
    """Recovery of a running job whose supervisor was killed, with another worker idle."""

    database: str
    """Kind of the database, which may differ from that of the other measurements."""

    lease_seconds: float
    kill_to_running: float
    """Seconds until another worker has claimed the job."""

    kill_to_new_step: float
    """Seconds until it has made a step beyond the last recorded one."""


@dataclass(frozen=True)
class Beside:
    """Training speed during generation."""

    steps_per_sec: float
    """Steps a second of a job without other load."""

    steps_per_sec_beside: float
    """Steps a second of the same job while one client streams texts, one after the other."""

    ratio: float
    """Speed during generation over speed without it: median of the turns' ratios."""


def claim_times(db: Database, queued: tuple[int, ...]) -> Iterator[ClaimTime]:
    """Time claims with each number of queued jobs, from the smallest; the jobs stay in the database."""
    worker = WorkerIdentity(name="bench")
    worker_started(db, worker)
    config = JobConfig().model_dump(mode="json")
    for n in sorted(queued):
        submit_job(db, NewJob(text="Era uma vez", config=config))
        fill(db, n - _n_queued(db))
        taken = []
        for _ in range(min(n, _CLAIMS)):
            began = time.perf_counter()
            claim = queue.claim(db, worker, 3600)
            taken.append(time.perf_counter() - began)
            assert claim is not None
        yield ClaimTime(n, statistics.median(taken), max(taken))


def _n_queued(db: Database) -> int:
    with db.read() as session:
        return session.scalars(sa.select(sa.func.count()).select_from(jobs).where(QUEUED)).one()


def traffic(service: TemporaryService, *, training: bool, seconds: float) -> Traffic:
    """Count submissions for `seconds`; the jobs are cancelled afterwards."""
    with Client(service.url) as client, _in_training(service, client, wanted=training):
        probe = client.submit(_text(), JobConfig(epochs=1), priority=-100)
        over = Event()
        with concurrent.futures.ThreadPoolExecutor(_CLIENTS + 1) as pool:
            polling = pool.submit(_poll, service.url, probe.id, over)
            began = time.perf_counter()
            submitting = [pool.submit(_submit, service.url, began + seconds) for _ in range(_CLIENTS)]
            submitted = [job_id for done in submitting for job_id in done.result()]
            taken = time.perf_counter() - began
            over.set()
            latencies = polling.result()
        for job_id in (*submitted, probe.id):
            queue.request_cancel(service.database, job_id)
    return Traffic(training, len(submitted) / taken, statistics.median(latencies), _percentile(latencies, 0.99))


def _submit(url: str, until: float) -> list[str]:
    submitted = []
    with Client(url) as client:
        while time.perf_counter() < until:
            submitted.append(client.submit(_text(), JobConfig(epochs=1), priority=-100).id)
    return submitted


def _poll(url: str, job_id: str, over: Event) -> list[float]:
    latencies = []
    with Client(url) as client:
        while not over.is_set():
            began = time.perf_counter()
            client.job(job_id)
            latencies.append(time.perf_counter() - began)
    return latencies


@contextmanager
def _in_training(service: TemporaryService, client: Client, *, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    job = client.submit(_text(), JobConfig(epochs=_LONG), priority=100)
    rows.wait(service, job, rows.has_trained)
    yield
    rows.cancel(service, job)


def delays(service: TemporaryService, n_jobs: int, settle: float) -> Delays:
    """`n_jobs` times: submit a job to an idle worker, queue another, cancel the first, and wait for the other to start.

    `settle`: seconds after which the next trainer is assumed to be warm.
    """
    running, first_step, cancelled, next_first_step = [], [], [], []
    with Client(service.url) as client:
        warm = client.submit(_text(), JobConfig(epochs=2))
        rows.wait(service, warm, lambda row: row.status == "succeeded")
        for _ in range(n_jobs):
            time.sleep(settle)
            began = time.monotonic()
            job = client.submit(_text(), JobConfig(epochs=_LONG))
            running.append(rows.wait(service, job, lambda row: row.status == "running") - began)
            first_step.append(rows.wait(service, job, rows.has_trained) - began)
            behind = client.submit(_text(), JobConfig(epochs=_LONG))
            time.sleep(settle)
            began = time.monotonic()
            job.cancel()
            cancelled.append(rows.wait(service, job, lambda row: row.status == "cancelled") - began)
            next_first_step.append(rows.wait(service, behind, rows.has_trained) - began)
            rows.cancel(service, behind)
    return Delays(n_jobs, *(_median_and_max(each) for each in (running, first_step, cancelled, next_first_step)))


def beside(service: TemporaryService, turns: int, seconds: float) -> Beside:
    """Measure training without and with a concurrent stream, in turns of `seconds` each."""
    with Client(service.url) as client, Client(service.url) as reader:
        job = client.submit(_text(), JobConfig(epochs=_LONG))
        rows.wait(service, job, lambda row: len(reads.list_checkpoints(service.database, row.id)) > 0)
        stream_from = reader.job(job.id)
        stream_from.generate("Era uma vez", max_new_tokens=1)  # the engine starts, and loads the checkpoint
        rates = []
        for _ in range(turns):
            alone = _steps_per_sec(service, job, seconds)
            over = Event()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                streaming = pool.submit(_stream_until, stream_from, over)
                rates.append((alone, _steps_per_sec(service, job, seconds)))
                over.set()
                streaming.result()
        rows.cancel(service, job)
    alone, disturbed = (statistics.median(each) for each in zip(*rates, strict=True))
    return Beside(alone, disturbed, statistics.median(two / one for one, two in rates))


def _stream_until(job: JobHandle, over: Event) -> None:
    while not over.is_set():
        for _ in job.generate("Era uma vez", max_new_tokens=80, stream=True):
            pass


def _steps_per_sec(service: TemporaryService, job: JobHandle, seconds: float) -> float:
    """Steps a second between two recorded batches that are at least `seconds` apart."""
    began, first = _next_batch(service, job)
    time.sleep(seconds)
    ended, last = _next_batch(service, job)
    return (last - first) / (ended - began)


def _next_batch(service: TemporaryService, job: JobHandle) -> tuple[float, int]:
    """Monotonic time at which the next batch of steps was recorded, and its last step."""
    before = reads.get_job(service.database, job.id).progress["step"]
    at = rows.wait(service, job, lambda row: row.progress["step"] > before)
    return at, reads.get_job(service.database, job.id).progress["step"]


def recovery(lease_seconds: float, settle: float) -> Recovery:
    """Kill a worker during a job, while another one is idle; with a temporary SQLite database."""
    with run_service(lease_seconds=lease_seconds, snapshot_seconds=1) as service, Client(service.url) as client:
        service.processes.start_worker("first worker")
        job = client.submit(_text(), JobConfig(epochs=_LONG))
        rows.wait(service, job, lambda row: row.progress.get("step", 0) > 100)
        service.processes.start_worker("second worker")
        rows.until(lambda: len(list_workers(service.database)) == 2, "the second worker did not start")
        time.sleep(settle)
        began = time.monotonic()
        service.processes.kill("first worker")
        left_at = reads.get_job(service.database, job.id).progress["step"]
        running = rows.wait(service, job, lambda row: row.status == "running" and row.attempt == 2) - began
        new_step = rows.wait(service, job, lambda row: row.progress["step"] > left_at) - began
    return Recovery(service.database.engine.dialect.name, lease_seconds, running, new_step)


def _text() -> str:
    from nanomoe.bench.models import paragraph

    return paragraph()


def _median_and_max(seconds: list[float]) -> tuple[float, float]:
    return statistics.median(seconds), max(seconds)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]
