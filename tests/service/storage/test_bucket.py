"""The installation, the check and the sweep of a bucket."""

import time
from datetime import timedelta

import pytest

from nanomoe import checkpoint
from nanomoe.store.store import Store, StoreUnavailable
from service.database.database import Database
from service.errors import NotInstalled, StartRefused
from service.jobs import queue, recording
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity
from service.settings import Settings
from service.storage import orphans
from service.storage.fsck import check
from service.storage.installation import join_installation
from service.storage.job_folders import checkpoint_folder
from service.storage.opening import open_store
from service.storage.orphans import find_orphans, sweep_orphans
from tests.buckets import Proxy, S3Server, failure
from tests.databases import ONLY_SQLITE
from tests.races import at_once

FILES = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 4}


@pytest.fixture
def store(settings: Settings, bucket_url: str) -> Store:
    return open_store(settings.model_copy(update={"store": bucket_url}))


def recorded(db: Database, store: Store, percent: int = 25) -> Claim:
    """A claimed job with one checkpoint."""
    submit_job(db, NewJob(text="a b", config={}))
    claim = queue.claim(db, WorkerIdentity(), 60)
    assert claim is not None
    folder = checkpoint_folder(claim.job_id, claim.fence, percent)
    manifest, sha256 = checkpoint.write(store / folder, FILES)
    recording.record_checkpoint(
        db, claim, percent=percent, step=1, epoch=1, folder=folder, manifest_sha256=sha256,
        files=[entry.model_dump() for entry in manifest.files], metrics={},
    )  # fmt: skip
    return claim


def test_a_database_and_a_bucket_become_one_installation(db: Database, store: Store, bucket_url: str) -> None:
    with pytest.raises(NotInstalled):
        join_installation(db, store)
    joined = at_once([lambda: join_installation(db, store, create=True)] * 4)
    assert {*joined, join_installation(db, store)} == {store.read("installation").decode()}
    store.put("installation", b"another")
    with pytest.raises(StartRefused, match=f"the bucket {bucket_url} .* check NANOMOE_DATABASE_URL and NANOMOE_STORE"):
        join_installation(db, store)


@ONLY_SQLITE
def test_a_bucket_with_the_jobs_of_another_database_is_refused(db: Database, store: Store) -> None:
    store.put("installation", b"another")
    (store / "jobs/a").write({"x": b"1"})
    with pytest.raises(StartRefused, match="do not belong together"):
        join_installation(db, store, create=True)
    assert store.read("installation") == b"another"


@ONLY_SQLITE
def test_a_bucket_that_does_not_let_us_in_is_refused_and_one_out_of_reach_is_waited_for(
    db: Database, settings: Settings, proxy: Proxy, s3_server: S3Server
) -> None:
    there = settings.model_copy(update={"store": f"s3://{s3_server.make_bucket()}"})
    proxy.decide = lambda _: failure("403 Forbidden", "AccessDenied")
    with pytest.raises(StartRefused, match="does not let the service in"):
        join_installation(db, open_store(there, retry_seconds=0.2), create=True)
    proxy.decide = lambda _: failure("503 Service Unavailable", "ServiceUnavailable")
    with pytest.raises(StoreUnavailable):
        join_installation(db, open_store(there, retry_seconds=0.2), create=True)
    proxy.decide = lambda _: None
    join_installation(db, open_store(there), create=True)


@ONLY_SQLITE
def test_each_harm_to_a_checkpoint_is_named_and_a_store_out_of_reach_is_none(
    db: Database, settings: Settings, proxy: Proxy, s3_server: S3Server
) -> None:
    store = open_store(settings.model_copy(update={"store": f"s3://{s3_server.make_bucket()}/a"}), retry_seconds=0.2)
    join_installation(db, store, create=True)
    claim = recorded(db, store)
    folder = store / checkpoint_folder(claim.job_id, claim.fence, 25)
    report = check(db, store)
    assert report.is_clean
    assert report.n_bytes == sum(map(len, FILES.values()))
    folder.put("model.safetensors", b"?" * 1024)
    (fault,) = check(db, store).faults
    assert (fault.kind, "model.safetensors: 1024 bytes, not those" in fault.message) == ("damaged", True)
    folder.remove()
    (fault,) = check(db, store).faults
    assert fault.kind == "missing"
    proxy.decide = lambda _: failure("503 Service Unavailable", "ServiceUnavailable")
    with pytest.raises(StoreUnavailable):
        check(db, store)


def test_what_has_no_row_is_swept_after_a_day_and_nothing_else(
    db: Database, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_installation(db, store, create=True)
    claim, deleted = recorded(db, store), recorded(db, store)
    queue.finish(db, deleted, "succeeded")
    queue.delete(db, deleted.job_id)
    checkpoint.write(store / checkpoint_folder(claim.job_id, claim.fence, 50), FILES)  # complete, and without a row
    (store / checkpoint_folder(claim.job_id, claim.fence, 75)).put("config.json", b"{}")  # without its manifest
    for name in ("jobs/notes", "jobs/0123/f1-50", "elsewhere/f1-50"):
        (store / name).write({"x": b"1"})
    assert find_orphans(db, store) == [f"jobs/{deleted.job_id}"]  # the rest may be the running claim's
    queue.release(db, claim)
    left = [checkpoint_folder(claim.job_id, claim.fence, percent) for percent in (50, 75)]
    expected = sorted([*left, f"jobs/{deleted.job_id}"])
    assert find_orphans(db, store) == expected
    assert sweep_orphans(db, store) == []
    tomorrow = time.time() + timedelta(days=1, minutes=2).total_seconds()
    monkeypatch.setattr(orphans.time, "time", lambda: tomorrow)
    assert sweep_orphans(db, store) == expected
    assert find_orphans(db, store) == []
    assert check(db, store).is_clean
    assert all((store / name).exists() for name in ("jobs/notes", "jobs/0123/f1-50", "elsewhere/f1-50"))
