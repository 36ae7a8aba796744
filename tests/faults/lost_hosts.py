"""Two hosts on a network of their own, one of which is lost or cut off; and how long a job then waits.

    python -m tests.faults.lost_hosts --lease 60

It prints, in seconds, the time from each loss to the job's next attempt on the other host.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.database.database import Database
from service.database.opening import open_database
from service.jobs.tables import Job
from service.settings import Settings
from tests.buckets import S3Server, leading_to, running_s3
from tests.databases import PostgresqlServer, running_postgresql
from tests.faults.undisturbed import DENSE, TEXT, hooked
from tests.namespaces import Cable, Host, Network
from tests.worker.workplace import WorkerProcess, Workplace
from worker.timing import Timing

SHORT = DENSE | {"epochs": 4}


class HostPlace(Workplace):
    """A host with a data folder of its own, and the workers that a test starts on it."""

    def __init__(self, db: Database, settings: Settings, host: Host) -> None:
        """`settings`: those of what runs on the host; `db`: the same database, as it is reached from outside."""
        super().__init__(db, settings)
        self.host = host

    def start_worker(self, *arguments: Any, **options: Any) -> WorkerProcess:
        return super().start_worker(*arguments, **options, host=self.host)

    def end(self) -> None:
        """Lose the host, and wait until what waits for its processes has seen them end."""
        self.host.die()
        for worker in self._workers:
            worker.wait()


@dataclass(frozen=True)
class Servers:
    """PostgreSQL and a store on a network, and their ports there."""

    network: Network
    database_port: int
    store_port: int

    @contextmanager
    def place(self, name: str, db: Database, store: str, folder: Path) -> Iterator[HostPlace]:
        """A host that reaches both, until the end of the block. `db`: the database, as it is reached from outside."""
        with self.network.host(name) as host:
            host.environment["AWS_ENDPOINT_URL"] = f"http://{host.servers['store']}:{self.store_port}"
            server = f"{host.servers['database']}:{self.database_port}"
            url = f"postgresql+psycopg://postgres@{server}/{db.engine.url.database}"
            settings = Settings(_env_file=None, data_dir=folder / name, database_url=url, store=store)
            place = HostPlace(db, settings, host)
            try:
                yield place
            finally:
                place.end()


@contextmanager
def serving_hosts(postgresql: PostgresqlServer, s3: S3Server) -> Iterator[Servers]:
    """Both servers on a new network, until the end of the block."""
    with closing(Network()) as network:
        to = s3.url.removeprefix("http://")
        with postgresql.listening_in(network) as database_port, network.forwarding(to) as store_port:
            yield Servers(network, database_port, store_port)


def begin(
    place: HostPlace, s3: S3Server, point: str, hooks: dict[Any, Any], **options: Any
) -> tuple[Job, WorkerProcess]:
    """A job, and the new worker that has begun it. The trainer waits at a point of the checkpoint at 50 %, until the
    file `go` is in the job's folder. `hooks`: as of `hooked`."""
    program = hooked({1: {"wait": f"f1-50/{point}"}, **hooks})
    worker = place.start_worker(program=program, snapshot_seconds=1e-6, **{"backoff_seconds": 1, **options})
    job = place.submit(TEXT, **SHORT)
    assert place.settings.store is not None
    name = "manifest.json" if point == "renamed" else point.removeprefix("wrote ")
    written = f"{job.id}/f1-50/{name}"
    bucket = place.settings.store.split("/")[2]
    place.wait_until(lambda: any(key.endswith(written) for key in s3.keys(bucket)))
    return job, worker


def main() -> None:
    """Lose a host in each way, and print how long the job waited as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lease", type=float, default=60.0)
    options = parser.parse_args()
    os.environ.setdefault("NANOMOE_STEP_PATH", "eager")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = Settings(_env_file=None, lease_seconds=options.lease)
    losses: dict[str, tuple[Cable, ...]] = {
        "the host is lost": (),
        "it is cut off from the database": ("database",),
        "from the store": ("store",),
    }
    waited: dict[str, float] = {}
    with ExitStack() as stack:
        s3 = stack.enter_context(running_s3())
        stack.enter_context(leading_to(s3.url, stack.enter_context(pytest.MonkeyPatch.context())))
        postgresql = stack.enter_context(running_postgresql())
        servers = stack.enter_context(serving_hosts(postgresql, s3))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for n, (loss, cables) in enumerate(losses.items()):
            waited[loss] = round(_lose(servers, postgresql, s3, folder / str(n), Timing.of(given), cables), 1)
            print(json.dumps(waited), flush=True)


def _lose(
    servers: Servers,
    postgresql: PostgresqlServer,
    s3: S3Server,
    folder: Path,
    timing: Timing,
    cables: tuple[Cable, ...],
) -> float:
    """Seconds from the loss of a host, or of its cables, to the next attempt."""
    with ExitStack() as stack:
        url = postgresql.url(stack.enter_context(postgresql.database()))
        db = open_database(Settings(_env_file=None, data_dir=folder, database_url=url))
        stack.callback(db.close)
        store = f"s3://{s3.make_bucket()}/team"
        first, second = (stack.enter_context(servers.place(name, db, store, folder)) for name in "ab")
        job, _ = begin(first, s3, "wrote metrics.json", {}, timing=timing, backoff_seconds=15)
        second.start_worker(program=hooked({}), timing=timing, backoff_seconds=15)
        began = time.monotonic()
        if cables:
            first.host.cut(*cables)
            (first.folder(job) / "go").touch()
        else:
            first.host.die()
        second.wait_until(lambda: second.job(job).attempt == 2, timeout=1000)
        seconds = time.monotonic() - began
        assert second.wait_for(job, "succeeded", "failed").status == "succeeded"
        return seconds


if __name__ == "__main__":
    main()
