"""Two hosts, each in namespaces of its own, with PostgreSQL and a bucket between them: one loses its power, or is cut
off from either or both. What is sent to it or by it is dropped, and no connection is closed.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from sqlmodel import Session

from nanomoe.config import JobConfig
from nanomoe.store.store import StoreUnavailable
from service.database.database import Database
from service.database.opening import open_database
from service.errors import DatabaseUnavailable
from service.jobs import reads
from service.jobs.counters import raise_counter
from service.jobs.tables import Job
from service.settings import Settings
from service.storage.fsck import check
from service.storage.opening import open_store
from tests.buckets import S3Server
from tests.databases import ONLY_POSTGRESQL, PostgresqlServer
from tests.faults.lost_hosts import SHORT, HostPlace, Servers, begin, serving_hosts
from tests.faults.undisturbed import TEXT, assert_undisturbed, hooked, train_undisturbed
from tests.namespaces import Host
from tests.worker.workplace import SHORT_LEASE, WorkerProcess, ended_within, trainers_of

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def servers(postgresql_server: PostgresqlServer, s3_server: S3Server) -> Iterator[Servers]:
    with serving_hosts(postgresql_server, s3_server) as found:
        yield found


@pytest.fixture
def places(servers: Servers, db: Database, bucket_url: str, tmp_path: Path) -> Iterator[tuple[HostPlace, HostPlace]]:
    with ExitStack() as stack:
        first, second = (stack.enter_context(servers.place(name, db, bucket_url, tmp_path)) for name in "ab")
        yield first, second


def trainer_of(worker: WorkerProcess) -> psutil.Process:
    """The trainer of a worker on a host, as it is seen from outside."""
    (trainer,) = trainers_of(worker.supervisor.pid)
    return trainer


def assert_ended_once(place: HostPlace, job: Job) -> None:
    """The job ended on its second attempt, with every byte of an undisturbed run, and each checkpoint was recorded
    once."""
    done = place.wait_for(job, "succeeded", "failed")
    assert (done.status, done.attempt, done.fence) == ("succeeded", 2, 2), done.error
    assert place.statuses(job) == ["queued", "running", "queued", "running", "succeeded"]
    assert_undisturbed(place, job, train_undisturbed(JobConfig(**SHORT)))
    assert [event["percent"] for event in place.events(job, "checkpoint")] == [0, 25, 50, 75, 100]
    assert check(place.db, open_store(place.settings)).is_clean


@contextmanager
def database_from(place: HostPlace) -> Iterator[Database]:
    """The database, opened by this process as if it were on the host; each of its connections has been made."""
    with place.host.entered():
        db = open_database(place.settings)
        assert db.changes.wait(60, since=0), "it listens"
        db.time()
    yield db
    db.close()


@contextmanager
def failing_transaction(db: Database) -> Iterator[Session]:
    """A transaction that cannot be committed, because the database is out of reach at the end of the block."""
    with ExitStack() as stack:
        yield stack.enter_context(db.write())
        with pytest.raises(DatabaseUnavailable):
            stack.close()


@contextmanager
def api_on(host: Host, settings: Settings) -> Iterator["Client"]:
    """An API that runs on a host, on its loopback address."""
    environment = {
        **os.environ,
        **host.environment,
        "NANOMOE_DATA_DIR": str(settings.data_dir),
        "NANOMOE_DATABASE_URL": settings.database_url,
        "NANOMOE_STORE": settings.store or "",
        "NANOMOE_PORT": "0",
    }
    command = host.command(sys.executable, "-m", "service", folder=str(ROOT))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            found = re.fullmatch(r"nanomoe listening on (\S+)\n", started.stdout.readline())
            assert found
            yield Client(host, found[1])
        finally:
            for process in psutil.Process(started.pid).children():  # what has started it waits for it, and ends then
                process.kill()


@dataclass(frozen=True)
class Client:
    """A client on the host of an API."""

    host: Host
    url: str

    def get(self, path: str) -> httpx.Response:
        with self.host.entered():
            return httpx.get(f"{self.url}{path}", timeout=120)


@ONLY_POSTGRESQL
def test_a_job_ends_on_another_host_when_its_own_is_lost_and_nobody_fails_for_what_that_held(
    places: tuple[HostPlace, HostPlace], aws: S3Server
) -> None:
    lost, other = places
    job, _ = begin(lost, aws, "renamed", {}, timing=SHORT_LEASE)  # its manifest is written, and its row is not
    other.start_worker(program=hooked({}), timing=SHORT_LEASE)
    with database_from(lost) as db:
        with failing_transaction(db) as session:
            raise_counter(session, "jobs")  # as every submission has to
            time.sleep(0.5)  # nothing is on its way any more, so that only who asks for a sign of life finds out
            lost.host.die()
            seen = -1
            while (now := db.changes.wait(0.3, seen)) != seen:  # what has arrived before
                seen = now
            second = other.submit(TEXT, **SHORT)
        assert db.changes.wait(60, seen) > seen, "it notices that it is told of nothing any more"
    assert_ended_once(other, job)
    assert other.wait_for(second, "succeeded", "failed").status == "succeeded"


@ONLY_POSTGRESQL
def test_a_host_that_is_cut_off_from_the_database_writes_nothing_once_another_has_its_job(
    places: tuple[HostPlace, HostPlace], aws: S3Server
) -> None:
    cut_off, other = places
    job, worker = begin(cut_off, aws, "renamed", {}, timing=SHORT_LEASE)
    trainer = trainer_of(worker)
    successor = other.start_worker(program=hooked({}), timing=SHORT_LEASE)
    cut_off.host.cut("database")
    (cut_off.folder(job) / "go").touch()  # the checkpoint is written, and cannot be recorded
    assert ended_within(60, trainer), "at its lease's deadline"
    other.wait_until(lambda: other.job(job).attempt == 2)
    cut_off.host.mend("database")  # what was sent into the cable is sent again: it comes now
    assert_ended_once(other, job)
    assert_goes_on(cut_off, worker, successor)


@ONLY_POSTGRESQL
def test_a_host_that_is_cut_off_from_everything_answers_so_and_goes_on_once_it_is_not(
    places: tuple[HostPlace, HostPlace], aws: S3Server
) -> None:
    cut_off, other = places
    with api_on(cut_off.host, cut_off.settings) as api:
        job, worker = begin(cut_off, aws, "wrote metrics.json", {}, timing=SHORT_LEASE)
        assert api.get(f"/jobs/{job.id}").json()["status"] == "running"
        successor = other.start_worker(program=hooked({}), timing=SHORT_LEASE)
        cut_off.host.cut("database", "store")
        (cut_off.folder(job) / "go").touch()
        assert_unavailable(api.get("/readyz"), "database_unavailable")
        assert api.get("/healthz").status_code == 200
        assert_ended_once(other, job)
        cut_off.host.mend("database", "store")
        other.wait_until(lambda: api.get("/readyz").status_code == 200)
        assert api.get(f"/jobs/{job.id}").json()["status"] == "succeeded"
    assert_goes_on(cut_off, worker, successor)


@ONLY_POSTGRESQL
def test_a_host_that_is_cut_off_from_the_store_leaves_its_job_to_one_that_is_not(
    places: tuple[HostPlace, HostPlace], aws: S3Server
) -> None:
    cut_off, other = places
    with api_on(cut_off.host, cut_off.settings) as api:
        job, worker = begin(cut_off, aws, "wrote metrics.json", {"retries": 10}, timing=SHORT_LEASE)
        (*_, row) = reads.list_checkpoints(cut_off.db, job.id)
        file = f"/jobs/{job.id}/checkpoints/{row.percent}/files/{row.files[0]['name']}"
        assert api.get(file).status_code == 200
        successor = other.start_worker(program=hooked({}), timing=SHORT_LEASE)
        cut_off.host.cut("store")
        (cut_off.folder(job) / "go").touch()
        assert_unavailable(api.get(file), "store_unavailable")
        assert api.get(f"/jobs/{job.id}").status_code == 200
        assert_ended_once(other, job)
        assert other.job(job).crashes == 0
        reasons = [event["status_reason"] for event in other.events(job, "status")]
        assert reasons[2] == f"waits 1 s after an error outside of the job: {StoreUnavailable.summary}"
        cut_off.host.mend("store")
        other.wait_until(lambda: api.get(file).status_code == 200)
    assert_goes_on(cut_off, worker, successor)


def assert_unavailable(answer: httpx.Response, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, code)
    assert int(answer.headers["Retry-After"]) > 0


def assert_goes_on(place: HostPlace, worker: WorkerProcess, successor: WorkerProcess) -> None:
    """A worker on a host that was cut off trains the next job. `successor`: the other host's worker."""
    successor.signal(signal.SIGKILL)
    successor.wait()
    assert worker.wait(0) is None
    job = place.submit(TEXT, **SHORT)
    folder = place.folder(job)
    folder.mkdir(parents=True)
    (folder / "go").touch()
    done = place.wait_for(job, "succeeded", "failed")
    assert (done.status, done.attempt) == ("succeeded", 1), done.error
    assert_undisturbed(place, job, train_undisturbed(JobConfig(**SHORT)))
