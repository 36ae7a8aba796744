"""What is read from the tables, the list of workers, and the installation."""

import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.database.database import Database
from service.errors import NotFound, NotInstalled, StartRefused
from service.jobs import queue, store
from service.jobs.queue import NewJob
from service.jobs.store import Job, WorkerIdentity
from service.jobs.tables import table
from tests.databases import Clock
from tests.races import at_once


def submit(db: Database, **changes: Any) -> Job:
    return queue.submit(db, NewJob(**{"text": "a b", "config": {}, **changes}))[0]


def finished(db: Database, worker: WorkerIdentity, percents: tuple[int, ...] = ()) -> Job:
    submit(db)
    claim = queue.claim(db, worker, 60)
    assert claim is not None
    for percent in percents:
        queue.record_checkpoint(
            db, claim, percent=percent, step=percent, epoch=percent / 2, folder=f"jobs/x/f1-{percent}",
            manifest_sha256="m", files=[{"name": "config.json", "size": 2, "sha256": "s"}], metrics={"loss": 1.5},
        )  # fmt: skip
    return queue.finish(db, claim, "succeeded")


# Jobs


def test_a_job_that_is_not_there_is_not_found(db: Database) -> None:
    with pytest.raises(NotFound) as refused:
        store.get_job(db, "0" * 32)
    assert (refused.value.status, refused.value.code) == (404, "job_not_found")


def test_pages_go_from_new_to_old_and_inserts_do_not_shift_them(db: Database) -> None:
    old = [submit(db).id for _ in range(7)]
    seen: list[str] = []
    before = None
    while page := store.list_jobs(db, before=before, limit=3):
        seen += [job.id for job in page]
        before = page[-1].seq
        submit(db)
    assert seen == old[::-1]


def test_jobs_are_listed_by_status_tag_and_owner(db: Database) -> None:
    plain = submit(db)
    tagged = submit(db, tags={"course": "nlp-101", "a.b-c_d": "x:y"}, owner="me")
    queue.request_cancel(db, plain.id)

    def listed(**by: Any) -> list[str]:
        return [job.id for job in store.list_jobs(db, **by)]

    assert listed() == [tagged.id, plain.id]
    assert listed(status="cancelled") == [plain.id]
    assert listed(status="queued") == [tagged.id]
    assert listed(status="running") == []
    assert listed(tag=("course", "nlp-101")) == [tagged.id]
    assert listed(tag=("course", None)) == [tagged.id]
    assert listed(tag=("a.b-c_d", "x:y")) == [tagged.id]
    assert listed(tag=("course", "nlp-102")) == listed(tag=("other", None)) == []
    assert listed(owner="me") == [tagged.id]
    assert listed(owner="") == [plain.id]


def test_jobs_are_listed_in_the_order_of_their_submission_whatever_their_ids(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(("c" * 32, "a" * 32, "b" * 32))  # two processes, or a clock that was set back
    monkeypatch.setattr(queue, "new_id", lambda: next(ids))
    jobs = [submit(db) for _ in range(3)]
    listed = [job.id for job in store.list_jobs(db)]
    assert listed == ["b" * 32, "a" * 32, "c" * 32]
    assert [job.id for job in store.list_jobs(db, before=jobs[1].seq)] == ["c" * 32]


def test_a_job_is_relabelled(db: Database) -> None:
    job = submit(db, name="old", tags={"a": "b"})
    assert store.relabel(db, job.id, {"name": None}).name is None
    assert store.relabel(db, job.id, {"tags": {"c": "d"}}).tags == {"c": "d"}
    found = store.get_job(db, job.id)
    assert (found.name, found.tags, found.status) == (None, {"c": "d"}, "queued")
    with pytest.raises(NotFound):
        store.relabel(db, "0" * 32, {"name": "x"})


def test_relabelling_and_the_queue_do_not_overwrite_each_other(db: Database) -> None:
    """The one writes the labels, the other the status: neither writes a whole row."""
    jobs = [submit(db) for _ in range(10)]
    calls = [lambda job=job: store.relabel(db, job.id, {"name": "new"}) for job in jobs]
    at_once([*calls, *(lambda job=job: queue.request_cancel(db, job.id) for job in jobs)])
    assert {(job.name, job.status) for job in store.list_jobs(db)} == {("new", "cancelled")}


def test_jobs_are_counted_by_status(db: Database) -> None:
    assert store.count_jobs(db) == dict.fromkeys(store.STATUSES, 0)
    submit(db)
    queue.request_pause(db, submit(db).id)
    assert store.count_jobs(db) == dict.fromkeys(store.STATUSES, 0) | {"queued": 1, "paused": 1}


def test_a_text_is_found_by_its_hash(db: Database) -> None:
    assert store.get_text(db, submit(db, text="olá").text_sha256) == "olá".encode()
    with pytest.raises(NotFound) as refused:
        store.get_text(db, "0" * 64)
    assert refused.value.code == "text_not_found"


# What a job recorded


def test_checkpoints_are_listed_by_percent(db: Database) -> None:
    job = finished(db, WorkerIdentity(), (50, 0, 100))
    assert [found.percent for found in store.list_checkpoints(db, job.id)] == [0, 50, 100]
    newest = store.get_checkpoint(db, job.id, "latest")
    assert (newest.percent, newest.step, newest.epoch, newest.metrics) == (100, 100, 50.0, {"loss": 1.5})
    assert newest.files == [{"name": "config.json", "size": 2, "sha256": "s"}]
    assert store.get_checkpoint(db, job.id, 0).percent == 0


def test_a_checkpoint_that_is_not_there_is_told_from_a_job_that_is_not(db: Database) -> None:
    job = submit(db)
    for job_id, percent, code in (
        (job.id, 25, "checkpoint_not_found"),
        (job.id, "latest", "checkpoint_not_found"),
        ("0" * 32, "latest", "job_not_found"),
    ):
        with pytest.raises(NotFound) as refused:
            store.get_checkpoint(db, job_id, percent)  # type: ignore[arg-type]
        assert refused.value.code == code
    assert store.list_checkpoints(db, job.id) == []
    with pytest.raises(NotFound):
        store.list_checkpoints(db, "0" * 32)


def test_the_folders_of_a_job_are_named_after_the_claim_that_writes_them() -> None:
    assert store.checkpoint_folder("j", 1, 25) == "jobs/j/f1-25"
    assert store.snapshot_folder("j", 1, 7) == "jobs/j/f1-s7"


# Workers


def test_workers_are_listed_with_what_they_run(db: Database, clock: Clock) -> None:
    first = WorkerIdentity(
        name="gpu-1",
        devices=[{"device": "cuda:0", "name": "H100", "memory_bytes": 80}],
        slots=2,
        versions={"torch": "2"},
    )
    store.worker_started(db, first)
    clock.advance(1)
    second = WorkerIdentity(name="gpu-1")
    store.worker_started(db, second)
    claims = [submit(db) and queue.claim(db, first, 60) for _ in range(2)]
    clock.advance(1)
    store.worker_seen(db, first.id)
    (row, running), (other, idle) = store.list_workers(db)
    assert (row.id, row.name, row.slots, row.versions) == (first.id, "gpu-1", 2, {"torch": "2"})
    assert row.devices == [{"device": "cuda:0", "name": "H100", "memory_bytes": 80}]
    assert [job.id for job in running] == [claim.job_id for claim in claims if claim is not None]
    assert (row.last_seen_at, row.stopped_at) == (clock.now, None)
    assert (other.id, idle) == (second.id, [])
    store.worker_stopped(db, second.id)
    assert store.list_workers(db)[1][0].stopped_at == clock.now


@pytest.mark.parametrize("lease_seconds", [15.0, 1200.0])
def test_a_worker_is_alive_for_a_lease_after_it_was_seen_unless_it_stopped(
    db: Database, clock: Clock, lease_seconds: float
) -> None:
    identity = WorkerIdentity(lease_seconds=lease_seconds)
    store.worker_started(db, identity)

    def alive() -> bool:
        return store.is_alive(store.list_workers(db)[0][0], db.time())

    clock.advance(lease_seconds - 1)
    assert alive()
    clock.advance(1)
    assert not alive()
    store.worker_seen(db, identity.id)
    assert alive()
    store.worker_stopped(db, identity.id)
    assert not alive()


def test_a_worker_not_seen_for_a_day_is_forgotten(db: Database, clock: Clock) -> None:
    old, new = WorkerIdentity(name="old"), WorkerIdentity(name="new")
    store.worker_started(db, old)
    clock.advance(store.WORKER_KEPT.total_seconds() + 1)
    store.worker_started(db, new)
    assert [worker.id for worker, _ in store.list_workers(db)] == [new.id]


# The installation


def set_installation(db: Database, installation: str | None) -> None:
    with db.write() as session:
        session.execute(sa.delete(table(store.Installation)))
        if installation is not None:
            session.execute(sa.insert(table(store.Installation)).values(id=installation, created_at=db.now))


def test_a_new_database_and_a_new_folder_become_one_installation(db: Database, tmp_path: Path) -> None:
    with pytest.raises(NotInstalled):
        store.join_installation(db, tmp_path)  # a worker that is there before the API
    installation = store.join_installation(db, tmp_path, create=True)
    assert store.join_installation(db, tmp_path) == installation
    assert store.join_installation(db, tmp_path, create=True) == installation


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(("in_database", "on_disk"), [("a", "b"), ("a", None), (None, "b")])
def test_a_database_and_a_folder_that_do_not_belong_together_are_refused(
    db: Database, tmp_path: Path, create: bool, in_database: str | None, on_disk: str | None
) -> None:
    set_installation(db, in_database)
    if on_disk is not None:
        (tmp_path / "installation").write_text(on_disk)
        (tmp_path / "jobs" / "1").mkdir(parents=True)
    with pytest.raises(StartRefused) as refused:
        store.join_installation(db, tmp_path, create=create)
    # Without an id in the database a worker cannot tell: the API may be about to write it.
    may_be_early = in_database is None and not create
    assert isinstance(refused.value, NotInstalled) == may_be_early
    assert ("do not belong together" in str(refused.value)) != may_be_early
    assert not (tmp_path / "installation").exists() or (tmp_path / "installation").read_text() == on_disk


def test_a_start_that_died_between_folder_and_database_is_finished(db: Database, tmp_path: Path) -> None:
    (tmp_path / "installation").write_text("a")
    assert store.join_installation(db, tmp_path, create=True) == "a"
    assert store.join_installation(db, tmp_path) == "a"


def test_two_that_start_at_once_agree(db: Database, tmp_path: Path) -> None:
    joined = at_once([lambda: store.join_installation(db, tmp_path, create=True)] * 4)
    assert len(set(joined)) == 1


def test_ids_made_by_many_threads_are_unique_and_increase() -> None:
    made: list[list[str]] = [[] for _ in range(4)]

    def make(mine: list[str]) -> None:
        mine.extend(store.new_id() for _ in range(2_000))

    threads = [threading.Thread(target=make, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len(set().union(*made)) == 8_000
