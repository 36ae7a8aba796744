"""How fast jobs come in, begin and end, on a service of its own.

What a user waits for is measured from outside: from the request sent to the row that shows what was asked for.
"""

import concurrent.futures
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import sqlalchemy as sa

from nanomoe.config import JobConfig
from service.cli.bench.site import Site, open_site
from service.client import Client, JobHandle
from service.database.database import Database
from service.database.schema import table
from service.jobs import queue, reads
from service.jobs.claim_order import QUEUED, jobs
from service.jobs.ids import new_id
from service.jobs.new_job import NewJob
from service.jobs.tables import Counter, Job
from service.jobs.workers import WorkerIdentity, list_workers, worker_started

_POLL_SECONDS = 0.002
_GIVE_UP_SECONDS = 300.0
_CLAIMS = 30
_CLIENTS = 4
_LONG = 100_000
"""Epochs of a job that is still training when it is cancelled."""


@dataclass(frozen=True)
class ClaimTime:
    """How long a claim takes when so many jobs wait."""

    n_queued: int
    median_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Traffic:
    """Submissions by four clients at once, and what a fifth sees meanwhile."""

    training: bool
    """Whether a job was training beside them."""

    submits_per_sec: float
    get_p50_seconds: float
    """Median time of `GET /jobs/{id}`."""

    get_p99_seconds: float


@dataclass(frozen=True)
class Delays:
    """What a user waits for on a worker that was idle and warm; each the median and the largest of several jobs."""

    n_jobs: int
    submit_to_running: tuple[float, float]
    submit_to_first_step: tuple[float, float]
    """Seconds from the request sent to the first training step in the row."""

    cancel_to_cancelled: tuple[float, float]
    """Seconds from the request sent until no process of the job is left and the row says so."""

    cancel_to_next_first_step: tuple[float, float]
    """Seconds from the request sent to the first training step of the job that waited behind."""


@dataclass(frozen=True)
class Recovery:
    """After the supervisor of a running job was killed, with another worker idle."""

    database: str
    """Its kind, which is not that of the other measurements if those were told another."""

    lease_seconds: float
    kill_to_running: float
    """Seconds until another worker has claimed the job."""

    kill_to_new_step: float
    """Seconds until it has made a step beyond those that were recorded."""


@dataclass(frozen=True)
class Beside:
    """Training while somebody generates."""

    steps_per_sec: float
    """Steps a second of a job that has the machine for itself."""

    steps_per_sec_beside: float
    """Steps a second of the same job while one client streams texts, one after the other."""

    ratio: float
    """Beside over alone: the median of the turns' ratios."""


def claim_times(db: Database, queued: tuple[int, ...]) -> Iterator[ClaimTime]:
    """With each number of jobs in line, from the smallest; the jobs stay."""
    worker = WorkerIdentity(name="bench")
    worker_started(db, worker)
    config = JobConfig().model_dump(mode="json")
    for n in sorted(queued):
        queue.submit(db, NewJob(text="Era uma vez", config=config))
        _fill(db, n - _n_queued(db))
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


def _fill(db: Database, n: int) -> None:
    """Copy a queued job `n` times, within the database: a million submissions would take an hour."""
    if n <= 0:
        return
    columns = [column.name for column in jobs.columns if column.name not in ("id", "seq")]
    row = sa.select(jobs).where(QUEUED).limit(1).subquery()
    first = sa.select(sa.literal(1).label("i")).cte("numbers", recursive=True)
    numbers = first.union_all(sa.select(first.c.i + 1).where(first.c.i < n))
    salt = new_id()
    ids = sa.literal(salt[:-8]) + sa.func.substr(sa.cast(numbers.c.i + 100_000_000, sa.String), 2, 8)
    counters = table(Counter)
    with db.write() as session:
        raised = sa.update(counters).values(value=counters.c.value + n).returning(counters.c.value)
        seqs = session.scalars(raised).one() - n + numbers.c.i
        chosen = sa.select(ids, seqs, *(row.c[name] for name in columns)).select_from(numbers.join(row, sa.true()))
        if not db.is_sqlite:
            session.execute(sa.text("SET LOCAL statement_timeout = 0"))
        session.execute(sa.insert(jobs).from_select(["id", "seq", *columns], chosen))


def traffic(site: Site, *, training: bool, seconds: float) -> Traffic:
    """Submit for `seconds`; what was submitted is cancelled afterwards."""
    with Client(site.url) as client, _in_training(site, client, wanted=training):
        probe = client.submit(_text(), JobConfig(epochs=1), priority=-100)
        over = Event()
        with concurrent.futures.ThreadPoolExecutor(_CLIENTS + 1) as pool:
            looking = pool.submit(_look, site.url, probe.id, over)
            began = time.perf_counter()
            submitting = [pool.submit(_submit, site.url, began + seconds) for _ in range(_CLIENTS)]
            submitted = [job_id for done in submitting for job_id in done.result()]
            taken = time.perf_counter() - began
            over.set()
            looked = looking.result()
        for job_id in (*submitted, probe.id):
            queue.request_cancel(site.database, job_id)
    return Traffic(training, len(submitted) / taken, statistics.median(looked), _percentile(looked, 0.99))


def _submit(url: str, until: float) -> list[str]:
    submitted = []
    with Client(url) as client:
        while time.perf_counter() < until:
            submitted.append(client.submit(_text(), JobConfig(epochs=1), priority=-100).id)
    return submitted


def _look(url: str, job_id: str, over: Event) -> list[float]:
    looked = []
    with Client(url) as client:
        while not over.is_set():
            began = time.perf_counter()
            client.job(job_id)
            looked.append(time.perf_counter() - began)
    return looked


@contextmanager
def _in_training(site: Site, client: Client, *, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    job = client.submit(_text(), JobConfig(epochs=_LONG), priority=100)
    _wait(site, job, lambda row: row.progress.get("step", 0) > 0)
    yield
    _cancel(site, job)


def delays(site: Site, n_jobs: int, settle: float) -> Delays:
    """`n_jobs` times: submit to an idle worker, put another job behind it, cancel it, see the other begin.

    `settle`: seconds until the next trainer is taken to be warm.
    """
    running, first_step, cancelled, next_first_step = [], [], [], []
    with Client(site.url) as client:
        warm = client.submit(_text(), JobConfig(epochs=2))
        _wait(site, warm, lambda row: row.status == "succeeded")
        for _ in range(n_jobs):
            time.sleep(settle)
            began = time.monotonic()
            job = client.submit(_text(), JobConfig(epochs=_LONG))
            running.append(_wait(site, job, lambda row: row.status == "running") - began)
            first_step.append(_wait(site, job, lambda row: row.progress.get("step", 0) > 0) - began)
            behind = client.submit(_text(), JobConfig(epochs=_LONG))
            time.sleep(settle)
            began = time.monotonic()
            job.cancel()
            cancelled.append(_wait(site, job, lambda row: row.status == "cancelled") - began)
            next_first_step.append(_wait(site, behind, lambda row: row.progress.get("step", 0) > 0) - began)
            _cancel(site, behind)
    return Delays(n_jobs, *(_median_and_max(each) for each in (running, first_step, cancelled, next_first_step)))


def beside(site: Site, turns: int, seconds: float) -> Beside:
    """Train alone and beside a stream, by turns of so many seconds each."""
    with Client(site.url) as client, Client(site.url) as reader:
        job = client.submit(_text(), JobConfig(epochs=_LONG))
        _wait(site, job, lambda row: len(reads.list_checkpoints(site.database, row.id)) > 0)
        stream_from = reader.job(job.id)
        stream_from.generate("Era uma vez", max_new_tokens=1)  # the engine starts, and loads the checkpoint
        rates = []
        for _ in range(turns):
            alone = _steps_per_sec(site, job, seconds)
            over = Event()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                streaming = pool.submit(_stream_until, stream_from, over)
                rates.append((alone, _steps_per_sec(site, job, seconds)))
                over.set()
                streaming.result()
        _cancel(site, job)
    alone, disturbed = (statistics.median(each) for each in zip(*rates, strict=True))
    return Beside(alone, disturbed, statistics.median(two / one for one, two in rates))


def _stream_until(job: JobHandle, over: Event) -> None:
    while not over.is_set():
        for _ in job.generate("Era uma vez", max_new_tokens=80, stream=True):
            pass


def _steps_per_sec(site: Site, job: JobHandle, seconds: float) -> float:
    """From one recorded batch of steps to another, at least `seconds` later."""
    began, first = _next_batch(site, job)
    time.sleep(seconds)
    ended, last = _next_batch(site, job)
    return (last - first) / (ended - began)


def _next_batch(site: Site, job: JobHandle) -> tuple[float, int]:
    """When the next batch of steps was seen, on the monotonic clock, and its last step."""
    before = reads.get_job(site.database, job.id).progress["step"]
    at = _wait(site, job, lambda row: row.progress["step"] > before)
    return at, reads.get_job(site.database, job.id).progress["step"]


def recovery(lease_seconds: float, settle: float) -> Recovery:
    """Kill a worker in the middle of a job, while another one is idle; on a SQLite of its own."""
    with open_site(lease_seconds=lease_seconds, snapshot_seconds=1) as site, Client(site.url) as client:
        site.processes.start_worker("first worker")
        job = client.submit(_text(), JobConfig(epochs=_LONG))
        _wait(site, job, lambda row: row.progress.get("step", 0) > 100)
        site.processes.start_worker("second worker")
        _until(lambda: len(list_workers(site.database)) == 2, "the second worker did not start")
        time.sleep(settle)
        began = time.monotonic()
        site.processes.kill("first worker")
        left_at = reads.get_job(site.database, job.id).progress["step"]
        running = _wait(site, job, lambda row: row.status == "running" and row.attempt == 2) - began
        new_step = _wait(site, job, lambda row: row.progress["step"] > left_at) - began
    return Recovery(site.database.engine.dialect.name, lease_seconds, running, new_step)


def _cancel(site: Site, job: JobHandle) -> None:
    job.cancel()
    _wait(site, job, lambda row: row.status == "cancelled")


def _wait(site: Site, job: JobHandle, until: Callable[[Job], bool]) -> float:
    """The monotonic time at which the row first looked so."""
    return _until(lambda: until(reads.get_job(site.database, job.id)), f"job {job.id} did not get there")


def _until(holds: Callable[[], bool], otherwise: str) -> float:
    """The monotonic time at which it first held. Raises AssertionError when it takes too long."""
    give_up = time.monotonic() + _GIVE_UP_SECONDS
    while not holds():
        assert time.monotonic() < give_up, otherwise
        time.sleep(_POLL_SECONDS)
    return time.monotonic()


def _text() -> str:
    from nanomoe.bench.models import paragraph

    return paragraph()


def _median_and_max(seconds: list[float]) -> tuple[float, float]:
    return statistics.median(seconds), max(seconds)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]
