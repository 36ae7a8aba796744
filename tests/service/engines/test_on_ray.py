"""Fleets on a real Ray cluster: real workers that train, and whatever runs them killed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from service.database.database import Database
from service.engines import fleet as engines
from service.engines.on_ray import check_database
from service.jobs import queue, reads
from service.jobs.tables import Job
from service.settings import Settings
from tests.databases import ONLY_POSTGRESQL, ONLY_SQLITE
from tests.service.engines.ray_cluster import RayCluster
from tests.worker.workplace import Workplace, is_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray has clusters on Linux only")

NANOMOE = Path(sys.executable).parent / "nanomoe"
TINY = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "tokenizer": "bytes"}
ENDLESS = TINY | {"epochs": 1_000_000, "stop_at_perplexity": None}
SHORT = TINY | {"epochs": 3}

T = TypeVar("T")


class Fleet:
    """The commands of a fleet, as a person gives them."""

    def __init__(self, cluster: RayCluster, place: Workplace) -> None:
        self.cluster = cluster
        self.place = place
        self._environment = cluster.environment | {
            "NANOMOE_DATA_DIR": str(place.settings.data_dir),
            "NANOMOE_DATABASE_URL": place.settings.database_url,
            "NANOMOE_LEASE_SECONDS": "30",
            "NANOMOE_SNAPSHOT_SECONDS": "0.5",
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NANOMOE, "workers", *arguments, "--on", "ray", "--address", self.cluster.address],
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def done(self, *arguments: str) -> Any:
        """What a command answers, as JSON."""
        ran = self.run(*arguments, "--json")
        assert ran.returncode == 0, ran.stderr + self.cluster.logs()
        return json.loads(ran.stdout)

    def workers(self, state: str = "running") -> list[dict[str, Any]]:
        """Those of one state; whatever else the command says while a part of the cluster is away, none."""
        ran = self.run("status", "--json")
        found = json.loads(ran.stdout)["workers"] if ran.returncode == 0 else []
        return [worker for worker in found if worker["state"] == state]

    def wait_until(self, holds: Callable[[], T]) -> T:
        """The first true value of `holds`, which asks by a command: each costs seconds of a processor."""
        give_up = time.monotonic() + 200
        while not (value := holds()):
            assert time.monotonic() < give_up, self.cluster.logs()
            time.sleep(1)
        return value

    def wait_for_claim(self, job: Job, fence: int) -> Job:
        """The job, once it was claimed for the `fence`-th time and is being trained."""

        def claimed() -> Job | None:
            now = self.place.job(job)
            return now if now.fence >= fence and now.status == "running" and now.progress.get("step") else None

        try:
            found: Job = self.place.wait_until(claimed, timeout=200)  # type: ignore[assignment]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.logs()}") from None
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    yield cluster
    cluster.end()


@pytest.fixture
def fleet(cluster: RayCluster, db: Database, settings: Settings) -> Iterator[Fleet]:
    fleet = Fleet(cluster, Workplace(db, settings))
    yield fleet
    fleet.run("down", "--now")
    cluster.end_nodes()


@ONLY_POSTGRESQL
@pytest.mark.timeout(900)
def test_a_worker_is_there_again_whatever_of_it_is_killed(fleet: Fleet) -> None:
    place, cluster = fleet.place, fleet.cluster
    node = cluster.add_node(cpus=1)
    fleet.done("up", "--count", "1", "--cpus", "1")
    job = place.submit(**ENDLESS)
    fleet.wait_for_claim(job, 1)
    (worker,) = fleet.workers()
    assert fleet.done("up", "--count", "1", "--cpus", "1")["workers"] == [worker]  # nothing happens

    # Its own process: the job waits until the lease has ended.
    psutil.Process(worker["pid"]).kill()
    fleet.wait_for_claim(job, 2)
    (again,) = fleet.workers()
    assert again["restarts"] == 1

    # The actor: the worker outlives it until the job has a snapshot.
    psutil.Process(again["pid"]).parent().kill()  # type: ignore[union-attr]
    fleet.wait_for_claim(job, 3)

    # The raylet of its host, while there is another host.
    other = cluster.add_node(cpus=1)
    before = {process.pid for process in node.raylet.children(recursive=True)}
    node.raylet.kill()
    fleet.wait_for_claim(job, 4)
    (moved,) = fleet.wait_until(fleet.workers)
    assert moved["pid"] in {process.pid for process in other.raylet.children(recursive=True)} - before

    # The head: the worker trains on, and the new head knows it.
    cluster.head.lose()
    step = place.job(job).progress["step"]
    place.wait_for_step(job, step + 1)
    cluster.head.end()
    cluster.start_head()
    fleet.wait_until(lambda: fleet.workers() == [moved])
    fleet.wait_until(lambda: fleet.done("status")["problem"] is None)

    assert fleet.done("down")["ended"] == ["nanomoe-0"]
    assert not is_alive(moved["pid"])
    drained = place.job(job)
    assert drained.status == "queued"
    assert reads.find_snapshot(place.db, job.id) is not None
    # Only the first was a crash: each other time the worker gave its job back to the queue.
    _, first, *others = [data["status_reason"] for data in place.events(job, "status") if data["status"] == "queued"]
    assert "after a crash" in first
    assert len(others) >= 3
    assert not any("after a crash" in reason for reason in others)
    assert "no_such_fleet" in fleet.run("status").stderr


@ONLY_SQLITE
@pytest.mark.timeout(900)
def test_workers_follow_the_queue_to_zero_and_up_again(fleet: Fleet) -> None:
    place, cluster = fleet.place, fleet.cluster
    cluster.add_node(cpus=2, gpus=99)
    asked = ("up", "--min", "0", "--max", "3", "--cpus", "1", "--idle-seconds", "1")
    assert fleet.done(*asked)["workers"] == []
    jobs = [place.submit(**ENDLESS) for _ in range(4)]
    for job in jobs[:2]:
        fleet.wait_for_claim(job, 1)
    # As many as may be, of which two have a place.
    (pending,) = fleet.wait_until(lambda: fleet.workers("pending"))
    assert pending["reason"] == "no host has had room for it yet"
    assert len(fleet.workers()) == 2
    for job in jobs:
        queue.request_cancel(place.db, job.id)
    fleet.wait_until(lambda: fleet.done("status")["workers"] == [])
    cluster.process("ray::KeeperActor").kill()
    finite = place.submit(**SHORT)
    place.wait_for(finite, "succeeded", timeout=200)

    # Changed: one that always runs, beside no other.
    fleet.done("up", "--count", "1", "--cpus", "1")
    last = place.submit(**ENDLESS)
    fleet.wait_for_claim(last, 1)
    assert [worker["name"] for worker in fleet.workers()] == ["nanomoe-0"]
    # Changed so that each worker is another one: the first returns its job to the queue.
    fleet.done("up", "--count", "1", "--cpus", "2")
    fleet.wait_for_claim(last, 2)
    fleet.done("down", "--now")
    place.wait_for(last, "queued")

    # A host that has not what the cluster believes: the worker refuses to start, and nothing is tried again.
    fleet.done("up", "--count", "1", "--cpus", "1", "--gpus", "99")
    (worker,) = fleet.wait_until(lambda: fleet.workers("refused"))
    assert "was asked for; nvidia-smi shows" in worker["reason"]


def test_sqlite_is_refused_where_there_are_several_hosts() -> None:
    nodes = [{"NodeManagerHostname": name, "Alive": name != "c"} for name in "abc"]
    on_sqlite = engines.Fleet("many", 1, 1, environment={"NANOMOE_DATABASE_URL": "sqlite:////data/nanomoe.db"})
    with pytest.raises(engines.EngineError, match="the cluster has 2 hosts") as refusal:
        check_database(on_sqlite, nodes)
    assert refusal.value.code == "database_not_shared"
    check_database(on_sqlite, nodes[1:])
    check_database(engines.Fleet("many", 1, 1, environment={"NANOMOE_DATABASE_URL": "postgresql+psycopg://x"}), nodes)


def refused(fleet: Fleet, *arguments: str, **environment: str) -> str:
    """The one line with which a command refuses."""
    ran = fleet.run(*arguments, **environment)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr
    return ran.stderr.splitlines()[-1]


@ONLY_SQLITE
def test_a_cluster_refuses_who_has_no_token(fleet: Fleet, tmp_path: Path) -> None:
    said = [
        refused(fleet, "status", RAY_AUTH_TOKEN="", HOME=str(tmp_path)),
        refused(fleet, "status", RAY_AUTH_TOKEN="0" * 64),
        refused(fleet, "status", RAY_AUTH_MODE="disabled"),
    ]
    assert [line.partition(" the ")[0] for line in said] == ["nanomoe: cluster_refused:"] * 3
