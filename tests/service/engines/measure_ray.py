"""Figures of fleets on Ray: `python -m tests.service.engines.measure_ray [N_JOBS]`, with the product's own settings.

A cluster on loopback, SQLite, real training: seconds from `up` to the first claim; from whatever of a worker is killed
to its job running again; and the workers that follow a queue of many short jobs, over time.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import sqlalchemy as sa

from service.database import migrate
from service.database.opening import open_database
from service.database.schema import table
from service.jobs import queue
from service.jobs.tables import Job, Worker
from service.jobs.workers import is_alive
from service.settings import Settings
from tests.service.engines.ray_cluster import RayCluster
from tests.worker.workplace import Workplace

NANOMOE = Path(sys.executable).parent / "nanomoe"
TINY = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "tokenizer": "bytes"}
ENDLESS = TINY | {"epochs": 1_000_000}
SHORT = TINY | {"epochs": 20}
MOST = 4


def main(n_jobs: int) -> None:
    """Measure, and print as it goes."""
    folder, cluster = Path(tempfile.mkdtemp(prefix="measured-")), RayCluster()
    settings = Settings(_env_file=None, data_dir=folder)
    db = open_database(settings)
    try:
        migrate.upgrade(db)
        measure(Workplace(db, settings), cluster, n_jobs)
    finally:
        cluster.end()
        db.close()
        shutil.rmtree(folder)


def measure(place: Workplace, cluster: RayCluster, n_jobs: int) -> None:
    """Each figure in turn, in one cluster."""

    def workers(*arguments: str) -> list[dict[str, int]]:
        command = [NANOMOE, "workers", *arguments, "--on", "ray", "--address", cluster.address, "--json"]
        environment = cluster.environment | {"NANOMOE_DATA_DIR": str(place.settings.data_dir)}
        said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found: list[dict[str, int]] = json.loads(said).get("workers", [])
        return found

    def seconds_to_run(fence: int, began: float) -> str:
        def runs() -> bool:
            now = place.job(job)
            return now.fence >= fence and now.status == "running"

        place.wait_until(runs, timeout=600)
        took = time.monotonic() - began
        place.wait_for_step(job)
        return f"{took:.0f} s"

    node = cluster.add_node(cpus=MOST)
    job = place.submit(**ENDLESS)
    began = time.monotonic()
    (worker,) = workers("up", "--count", "1", "--cpus", "1") or [{}]
    print("up, to the first claim:", seconds_to_run(1, began), flush=True)

    (worker,) = workers("status")
    began = time.monotonic()
    psutil.Process(worker["pid"]).kill()
    print("worker killed, to its job running again:", seconds_to_run(2, began), flush=True)

    (worker,) = workers("status")
    actor = psutil.Process(worker["pid"]).parent()
    assert actor is not None
    began = time.monotonic()
    actor.kill()
    print("actor killed, to its job running again:", seconds_to_run(3, began), flush=True)

    cluster.add_node(cpus=MOST)
    began = time.monotonic()
    node.raylet.kill()
    print("raylet killed, to its job running again on the other host:", seconds_to_run(4, began), flush=True)
    queue.request_cancel(place.db, job.id)
    workers("down")

    workers("up", "--min", "0", "--max", str(MOST), "--cpus", "1", "--idle-seconds", "5")
    began = time.monotonic()
    for _ in range(n_jobs):
        place.submit(**SHORT)
    jobs, rows = table(Job), table(Worker)
    last, ended_at = "", 0.0
    while True:
        with place.db.read() as session:
            counts = dict(session.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)).all())
            now = session.scalars(sa.select(place.db.now)).one()
            known = list(session.scalars(sa.select(Worker).where(rows.c.name.like("nanomoe-%"))))
        alive = sum(is_alive(row, now) for row in known)
        waiting, running = counts.get("queued", 0), counts.get("running", 0)
        second = time.monotonic() - began
        if waiting + running == 0 and not ended_at:
            ended_at = second
        line = f"{alive} workers"
        if line != last or int(second) % 30 == 0:
            print(f"{second:6.1f} s: {waiting} waiting, {running} running, {line}", flush=True)
            last = line
        if waiting + running == 0 and alive == 0:
            break
        time.sleep(1)
    print(f"{n_jobs} jobs in {ended_at:.0f} s", flush=True)
    assert counts["succeeded"] == n_jobs, counts


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
