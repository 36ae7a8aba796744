"""API and workers on several hosts: PostgreSQL and a bucket are all that they share; each has its own data folder."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import httpx

from nanomoe.config import JobConfig
from service.database.database import Database
from service.jobs import reads
from service.settings import Settings
from service.storage.fsck import check
from service.storage.job_folders import job_folder
from service.storage.opening import open_store
from service.storage.orphans import find_orphans, sweep_orphans
from tests.buckets import S3Server
from tests.databases import ONLY_POSTGRESQL
from tests.faults.undisturbed import DENSE, TEXT, assert_undisturbed, hooked, train_undisturbed
from tests.worker.workplace import SHORT_LEASE, Workplace

SHORT = DENSE | {"epochs": 8}
"""A snapshot after each of its steps is a dozen requests."""

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def api_of(settings: Settings) -> Iterator[httpx.Client]:
    """A client of an API process with these settings."""
    environment = {
        **os.environ,
        "NANOMOE_DATA_DIR": str(settings.data_dir),
        "NANOMOE_DATABASE_URL": settings.database_url,
        "NANOMOE_STORE": settings.store or "",
        "NANOMOE_PORT": "0",
    }
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            found = re.fullmatch(r"nanomoe listening on (\S+)\n", started.stdout.readline())
            assert found
            with httpx.Client(base_url=found[1], timeout=120) as http:
                yield http
        finally:
            started.send_signal(signal.SIGTERM)
            started.wait(30)


@ONLY_POSTGRESQL
def test_a_job_whose_host_is_lost_goes_on_on_another_and_is_read_from_a_third(
    db: Database, settings: Settings, bucket_url: str, aws: S3Server, tmp_path: Path
) -> None:
    hosts = [settings.model_copy(update={"store": bucket_url, "data_dir": tmp_path / name}) for name in "abc"]
    first, second = (Workplace(db, host) for host in hosts[:2])
    try:
        # The first host is lost while it writes a checkpoint.
        stopped = {1: {"hold": "f1-25/wrote metrics.json"}}
        worker = first.start_worker(program=hooked(stopped), timing=SHORT_LEASE, snapshot_seconds=1e-6)
        job = first.submit(TEXT, **SHORT)
        bucket = bucket_url.split("/")[2]
        first.wait_until(lambda: any(key.endswith("f1-25/metrics.json") for key in aws.keys(bucket)))
        first.wait_until(lambda: reads.find_snapshot(db, job.id))
        worker.signal(signal.SIGKILL)
        worker.wait()
        snapshot = reads.find_snapshot(db, job.id)
        assert snapshot is not None

        second.start_worker(program=hooked({}), timing=SHORT_LEASE)
        done = second.wait_for(job, "succeeded", "failed", timeout=200)
        assert (done.status, done.attempt) == ("succeeded", 2)
        assert second.events(job, "warning")[-1]["message"].endswith(f"goes on from step {snapshot.step}")
        assert_undisturbed(second, job, train_undisturbed(JobConfig(**SHORT)))
        child = second.submit(TEXT, **SHORT | {"init_from": {"job_id": job.id, "checkpoint": 50}, "max_steps": 2})
        assert second.wait_for(child, "succeeded", "failed").error is None
    finally:
        first.end()
        second.end()
    assert {path.name for path in (hosts[0].data_dir / job_folder(job.id)).iterdir()} == {"text.txt", "pid.1"}

    store = open_store(hosts[2])
    report = check(db, store)
    assert report.is_clean
    assert report.n_checkpoints == 5 + 3
    assert f"{job_folder(job.id)}/f1-25" in find_orphans(db, store)
    assert sweep_orphans(db, store) == [], "a day has not passed"
    assert f"{job_folder(job.id)}/f1-25" in sweep_orphans(db, store, older_than=timedelta(0))
    assert find_orphans(db, store) == []
    assert check(db, store).is_clean

    with api_of(hosts[2]) as api:
        (*_, row) = reads.list_checkpoints(db, job.id)
        for file in row.files:
            answer = api.get(f"/jobs/{job.id}/checkpoints/100/files/{file['name']}")
            assert answer.status_code == 200, answer.text
            assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        asked = {"job_id": job.id, "prompt": "O rato", "max_new_tokens": 5, "temperature": 0}
        texts = [api.post("/generate", json=asked | {"checkpoint": percent}).json() for percent in (100, 100, 0)]
        assert texts[0]["choices"] == texts[1]["choices"]
        assert len(texts[2]["choices"][0]["tokens"]) == 5
        scored = api.post("/score", json={"job_id": job.id, "text": "O rato roeu"})
        assert scored.status_code == 200, scored.text
        config = SHORT | {"init_from": {"job_id": job.id, "checkpoint": 50}}
        assert api.post("/jobs", json={"text": TEXT, "config": config}).status_code == 201
        assert api.delete(f"/jobs/{child.id}").status_code == 204
        assert not (store / job_folder(child.id)).exists()
