"""Workers on a real Slurm of one host: preempted, near their time limit, cancelled, idle and drained."""

import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from service.database.database import Database
from service.engines.fleet import EngineError, Fleet, PlacedWorker, environment_of
from service.engines.on_slurm import SlurmEngine
from service.jobs import reads
from service.jobs.tables import Job
from service.jobs.workers import list_workers
from service.settings import Settings
from tests.databases import ONLY_SQLITE
from tests.slurm import SIGNALS, queued, slurm
from tests.worker.workplace import Workplace

pytestmark = [ONLY_SQLITE, pytest.mark.usefixtures("slurm_cluster")]

WORKER = (sys.executable, str(Path(__file__).parent / "scripted_worker.py"))


@pytest.fixture
def place(db: Database, settings: Settings) -> Workplace:
    return Workplace(db, settings)


@pytest.fixture
def engine(settings: Settings) -> SlurmEngine:
    return SlurmEngine(settings.data_dir, ["partition=low", "time=60"], command=WORKER)


def fleet_of(settings: Settings, count: int = 1, idle_seconds: int = 1000) -> Fleet:
    environment = environment_of(settings, os.environ) | {"NANOMOE_DATABASE_URL": settings.database_url}
    return Fleet("tests", 0, count, cpus=4, idle_seconds=idle_seconds, environment=environment)


def the_worker(engine: SlurmEngine) -> PlacedWorker:
    (worker,) = engine.status("tests").workers
    return worker


def runs_again(place: Workplace, engine: SlurmEngine, job: Job, restarts: int) -> None:
    """The task waits in Slurm's queue, where it would stay for a while; then the job goes on from its snapshot."""
    place.wait_for(job, "queued")
    snapshot = reads.find_snapshot(place.db, job.id)
    assert snapshot is not None
    before = place.job(job)
    assert before.crashes == 0
    waiting = place.wait_until(lambda: (found := the_worker(engine)).state == "pending" and found, timeout=60)

    requeued = time.time()

    def has_started() -> Job | None:
        # Once the run before is cleaned up, Slurm puts the next start two minutes off: again and again. Not in the
        # second of the requeue, though: a start of that second is one of the run that has ended to slurmd.
        if time.time() > requeued + 3:
            update = ["scontrol", "update", f"JobId={waiting.engine_id}", "StartTime=now"]
            subprocess.run(update, capture_output=True)
        now = place.job(job)
        return now if now.status == "running" else None

    running = place.wait_until(has_started)
    assert running.fence == before.fence + 1
    place.wait_for_step(job, snapshot.step + 1)
    assert the_worker(engine).restarts == restarts


@pytest.mark.parametrize("slurm_cluster", SIGNALS, indirect=True)
def test_a_job_survives_whatever_slurm_does_to_its_worker(place: Workplace, engine: SlurmEngine) -> None:
    fleet = fleet_of(place.settings)
    job = place.submit()
    (worker,) = engine.up(fleet).workers
    assert worker.name == "tests-0"
    place.wait_for_step(job)
    worker = the_worker(engine)
    assert (worker.state, worker.restarts) == ("running", 0)
    assert queued() == {worker.engine_id: "RUNNING"}
    ((row, _),) = list_workers(place.db)
    assert (row.name, row.devices[0]["device"]) == ("tests-0", "cpu:0")

    # Asked for the same again, by another shell: nothing happens.
    again = SlurmEngine(place.settings.data_dir, ["partition=low", "time=60"], command=WORKER).up(fleet)
    assert [one.engine_id for one in again.workers] == [worker.engine_id]
    assert list(queued()) == [worker.engine_id]

    # Preempted.
    slurm("srun", "--partition=high", "--cpus-per-task=8", "true")
    runs_again(place, engine, job, restarts=1)

    # Near the time limit: what `--signal` has Slurm send.
    slurm("scancel", "--signal=USR2", str(worker.engine_id))
    runs_again(place, engine, job, restarts=2)

    # Drained.
    (ended,) = engine.down("tests", now=False)
    assert ended.name == "tests-0"
    assert queued() == {}
    left = place.job(job)
    assert (left.status, left.crashes) == ("queued", 0)
    snapshot = reads.find_snapshot(place.db, job.id)
    assert snapshot is not None
    assert snapshot.step == left.progress["step"]
    assert all(row.stopped_at is not None for row, _ in list_workers(place.db))
    with pytest.raises(EngineError) as caught:
        engine.status("tests")
    assert caught.value.code == "no_such_fleet"


def test_a_task_that_somebody_cancels_does_not_come_back(place: Workplace, engine: SlurmEngine) -> None:
    fleet = fleet_of(place.settings, count=2)
    job = place.submit()
    assert [worker.name for worker in engine.up(fleet).workers] == ["tests-0", "tests-1"]
    place.wait_for_step(job)
    workers = place.wait_until(
        lambda: (found := engine.status("tests").workers) and all(one.state == "running" for one in found) and found
    )
    slurm("scancel", str(workers[0].engine_id))
    place.wait_until(lambda: engine.status("tests").workers[0].state == "ended")
    assert list(queued()) == [workers[1].engine_id]

    # `up` starts what is missing, and nothing else.
    more = engine.up(fleet).workers
    assert more[0].engine_id != workers[0].engine_id
    assert more[1].engine_id == workers[1].engine_id
    # A smaller fleet drains the rest; `--now` waits for no snapshot.
    fewer = engine.up(replace(fleet, most=1))
    assert {(one.name, one.state) for one in fewer.workers} >= {("tests-1", "draining")}
    engine.down("tests", now=True)
    assert queued() == {}
    place.wait_for(job, "queued")


def test_a_worker_without_a_job_gives_its_allocation_back(place: Workplace, engine: SlurmEngine) -> None:
    fleet = fleet_of(place.settings, idle_seconds=1)
    engine.up(fleet)
    place.wait_until(lambda: the_worker(engine).state == "ended")
    first = the_worker(engine)
    assert first.reason is None
    assert queued() == {}
    folder = place.settings.data_dir / "engines" / "slurm"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "tests")] == [0o700, 0o700]

    job = place.submit()
    (second,) = engine.up(fleet).workers
    assert second.engine_id != first.engine_id
    place.wait_for_step(job)
    (place.folder(job) / "finish").touch()
    place.wait_for(job, "succeeded")
    engine.down("tests", now=False)
    assert not (folder / "tests").exists()


def test_why_a_worker_may_not_start_is_told(place: Workplace, engine: SlurmEngine) -> None:
    fleet = fleet_of(place.settings)
    engine.up(replace(fleet, environment=fleet.environment | {"NANOMOE_LEASE_SECONDS": "-1"}))
    place.wait_until(lambda: the_worker(engine).state == "refused")
    assert "NANOMOE_LEASE_SECONDS" in str(the_worker(engine).reason)
    engine.down("tests", now=False)


def test_what_slurm_refuses_is_told(place: Workplace) -> None:
    engine = SlurmEngine(place.settings.data_dir, ["partition=none"], command=WORKER)
    with pytest.raises(EngineError, match="Invalid partition") as caught:
        engine.up(fleet_of(place.settings))
    assert caught.value.code == "slurm_refused"
    engine.down("tests", now=False)


def test_sqlite_is_for_a_cluster_of_one_host(
    place: Workplace, engine: SlurmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.parent.mkdir()
    sinfo.write_text("#!/bin/sh\nprintf 'one\\ntwo\\n'\n", "utf-8")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sinfo.parent}:{os.environ['PATH']}")
    with pytest.raises(EngineError, match="2 hosts, and SQLite serves one") as caught:
        engine.up(fleet_of(place.settings))
    assert caught.value.code == "database_not_shared"
    assert queued() == {}
