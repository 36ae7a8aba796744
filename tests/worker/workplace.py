"""What tests of the worker share: real worker processes over a real database, and ways to wait without sleeping."""

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import pytest
from sqlalchemy import make_url

from nanomoe.config import JobConfig
from service.database.database import Database
from service.database.engine_options import LOCK_TIMEOUT_SECONDS
from service.jobs import reads
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.tables import Job
from service.settings import Settings
from service.storage.installation import join_installation
from service.storage.job_folders import job_folder
from service.storage.opening import open_store
from tests.forks import FORKS
from tests.namespaces import Host
from tests.worker import run_worker
from worker.timing import Timing

HERE = Path(__file__).parent

QUICK = Timing(
    lease=30.0,
    heartbeat=1.0,
    rescue=0.5,
    record=0.05,
    poll=0.02,
    cancel_grace=0.5,
    stop_grace=5.0,
    exit_grace=2.0,
    retry=0.1,
)
"""The product's timing, shortened; the lease outlives the stalls of a busy machine."""

SHORT_LEASE = replace(QUICK, lease=4.0, heartbeat=0.5)
"""For tests in which a lease passes."""

T = TypeVar("T")


class WorkerProcess:
    """A worker in a process of its own."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._process = FORKS.Process(target=run_worker.run, args=[spec])
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._is_elsewhere = spec["host"] is not None

    @property
    def supervisor(self) -> psutil.Process:
        """The worker itself: on another host it is the child of the process that this one has started."""
        started = psutil.Process(self.pid)
        return started.children()[0] if self._is_elsewhere else started

    def signal(self, number: signal.Signals) -> None:
        self.supervisor.send_signal(number)

    def stop_between_transactions(self, place: "Workplace") -> None:
        """SIGSTOP at a moment at which the worker holds no lock of the database.

        A process that is stopped with SQLite's write lock in hand stops everybody; that is another fault.
        """
        while True:
            self.signal(signal.SIGSTOP)
            if place.nobody_writes():
                return
            self.signal(signal.SIGCONT)

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit status, or minus the signal; None if it still runs after `timeout` seconds."""
        self._process.join(timeout)
        return self._process.exitcode


class Workplace:
    """A data folder, its database, and the workers that a test starts."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db = db
        self.settings = settings
        self._workers: list[WorkerProcess] = []
        join_installation(db, open_store(settings), create=True)

    def submit(self, text: str = "uma frase curta para treinar", **config: Any) -> Job:
        job, _ = submit_job(self.db, NewJob(text=text, config=JobConfig(**config).model_dump(mode="json")))
        return job

    def submit_member(self, text: str = "uma frase curta para treinar", **config: Any) -> Job:
        """A job of one shape with all others that are submitted so."""
        new = NewJob(text=text, config=JobConfig(**config).model_dump(mode="json"), cohort_key="one", total_steps=100)
        return submit_job(self.db, new)[0]

    def start_worker(
        self,
        script: str | None = None,
        *,
        program: list[str] | None = None,
        device: str = "cpu",
        slots: int = 1,
        timing: Timing = QUICK,
        backoff_seconds: float = 0.05,
        max_crashes: int = 3,
        without: tuple[str, ...] = (),
        snapshot_seconds: float = 60.0,
        slow_disk_seconds: float = 0.0,
        busy_seconds: float = LOCK_TIMEOUT_SECONDS,
        log: Path | None = None,
        dies_at: tuple[str, int] | None = None,
        cohort: int | Literal["auto"] = 1,
        batches: Path | None = None,
        death: Path | None = None,
        fresh: bool = False,
        idle_seconds: float | None = None,
        host: Host | None = None,
    ) -> WorkerProcess:
        """A worker whose trainers follow `script`, run `program`, or train in earnest. `slow_disk_seconds`: that long
        it takes to verify a file. `busy_seconds`: that long it waits for SQLite's write lock. `log`: where its log
        goes. `dies_at`: which call of which of the queue's writes kills it. `cohort`: most jobs of one shape
        that a trainer trains together. `batches`: takes a line for each transaction about running jobs, with their
        number. `death`: the file of its next death (`next_death.py`), statements to the database being its lines.
        `fresh`: each trainer is a new interpreter, as one that trains in earnest always is, instead of a fork.
        `idle_seconds`: it ends after so long without a job. `host`: where it runs, unless here; the process is then one
        that waits for it."""
        if script is not None:
            program = [str(HERE / "scripted_trainer.py"), script]
        spec = {
            "folder": str(HERE.parent.parent),
            "settings": {
                "data_dir": str(self.settings.data_dir),
                "database_url": self.settings.database_url,
                "snapshot_seconds": snapshot_seconds,
                "cohort": cohort,
                "store": self.settings.store,
            },
            # The process is forked from one that may have been started before a test set them.
            "environment": {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
            | ({} if host is None else host.environment),
            "host": host and host.init,
            "timing": asdict(timing),
            "device": device,
            "slots": slots,
            "command": None if program is None else [sys.executable, *program],
            "warm": program is not None and not fresh and sys.platform == "linux",
            "max_crashes": max_crashes,
            "backoff_seconds": backoff_seconds,
            "without": without,
            "slow_disk_seconds": slow_disk_seconds,
            "dies_at": dies_at,
            "busy_seconds": busy_seconds,
            "batches": batches and str(batches),
            "death": death and str(death),
            "log": log and str(log),
            "idle_seconds": idle_seconds,
        }
        worker = WorkerProcess(spec)
        self._workers.append(worker)
        return worker

    def wait_until(self, holds: Callable[[], T], timeout: float = 120.0) -> T:
        """The first true value of `holds`, asked again after every commit, and ten times a second."""
        give_up = time.monotonic() + timeout
        while not (value := holds()):
            assert time.monotonic() < give_up, f"waited {timeout} s in vain: {self.describe()}"
            self.db.changes.wait(0.1)
        return value

    def wait_for(self, job: Job, *statuses: str, timeout: float = 120.0) -> Job:
        """The job, once it has one of these statuses."""
        return self.wait_until(lambda: self._in(job, statuses), timeout)

    def wait_for_step(self, job: Job, step: int = 1) -> Job:
        """The job, once that step is recorded."""
        return self.wait_until(lambda: (now := self.job(job)).progress.get("step", 0) >= step and now)  # type: ignore[return-value]

    def _in(self, job: Job, statuses: tuple[str, ...]) -> Job | None:
        now = self.job(job)
        return now if now.status in statuses else None

    def job(self, job: Job) -> Job:
        return reads.get_job(self.db, job.id)

    def describe(self) -> str:
        return ", ".join(
            f"{job.id[-6:]} {job.status} fence {job.fence} {job.progress} {job.status_reason} {job.error}"
            for job in reads.list_jobs(self.db)
        )

    def folder(self, job: Job) -> Path:
        return self.settings.data_dir / job_folder(job.id)

    def trainer(self, job: Job, attempt: int = 1) -> psutil.Process:
        """The process of a scripted or hooked trainer, once it has started on the job."""
        path = self.folder(job) / f"pid.{attempt}"
        return psutil.Process(int(self.wait_until(lambda: path.exists() and path.read_text())))

    def children_left(self, job: Job) -> list[int]:
        """The processes that a scripted trainer started on purpose and that still live."""
        file = self.folder(job) / "children"
        return [pid for pid in map(int, file.read_text().split()) if is_alive(pid)] if file.exists() else []

    def finish(self, job: Job) -> None:
        """Let a working script come to its end."""
        (self.folder(job) / "finish").touch()

    def recorded_steps(self, job: Job) -> list[int]:
        return [row.step for row in reads.steps_after(self.db, job.id, 0, 100_000)]

    def events(self, job: Job, kind: str) -> list[dict[str, Any]]:
        return [event.data for event in reads.events_after(self.db, job.id, 0) if event.kind == kind]

    def statuses(self, job: Job) -> list[str]:
        """Every status the job has had, oldest first."""
        return [data["status"] for data in self.events(job, "status")]

    def nobody_writes(self) -> bool:
        """Whether no other process is in the middle of a writing transaction."""
        with self.db.engine.connect() as connection:
            if not self.db.is_sqlite:
                writers = (
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid() AND backend_xid IS NOT NULL"
                )
                return not connection.exec_driver_sql(writers).scalar_one()
        with closing(sqlite3.connect(make_url(self.settings.database_url).database or "", timeout=0)) as file:
            try:
                file.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            return True

    @contextmanager
    def write_lock_held(self) -> Iterator[None]:
        """No other process can write to SQLite's file, though all can read it."""
        connection: Any = self.db.engine.raw_connection()
        connection.driver_connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.driver_connection.execute("ROLLBACK")
            connection.close()

    def end(self) -> None:
        """Kill what was started, stopped or not."""
        processes = []
        for worker in self._workers:
            if worker.wait(0) is None:
                processes += [*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)]
        for process in processes:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        for worker in self._workers:
            worker.wait()


def trainers_of(supervisor: int) -> list[psutil.Process]:
    """The trainers of a worker: its children that lead a session."""
    found = []
    for child in psutil.Process(supervisor).children():
        with suppress(ProcessLookupError):
            if os.getsid(child.pid) == child.pid:
                found.append(child)
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs or could; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended_within(seconds: float, process: psutil.Process) -> bool:
    """Whether it ends; a zombie has ended, whoever may reap it."""
    give_up = time.monotonic() + seconds
    while is_alive(process.pid):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def place(db: Database, settings: Settings) -> Iterator[Workplace]:
    """A workplace on each database."""
    workplace = Workplace(db, settings)
    yield workplace
    workplace.end()


__all__ = ["QUICK", "SHORT_LEASE", "Workplace", "ended_within", "is_alive", "place", "trainers_of"]
