"""What a trainer is given is verified first, however long that takes."""

import signal

from nanomoe.config import JobConfig
from service.database.database import Database
from service.jobs import queue, reads, recording
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity
from service.settings import Settings
from service.storage.job_folders import checkpoint_folder, job_folder
from tests.databases import ONLY_SQLITE
from tests.service.tiny_checkpoint import write_tiny_checkpoint
from tests.worker.workplace import SHORT_LEASE, Workplace
from worker.start import build_start

TEXT = "o rato roeu a roupa do rei de Roma"


def claimed(db: Database) -> Claim:
    submit_job(db, NewJob(text=TEXT, config=JobConfig().model_dump(mode="json")))
    claim = queue.claim(db, WorkerIdentity(), 60)
    assert claim is not None
    return claim


@ONLY_SQLITE
def test_a_text_whose_bytes_changed_between_two_attempts_is_written_again(db: Database, settings: Settings) -> None:
    job = claimed(db).job
    start, _, _ = build_start(db, job, device="cpu", settings=settings)
    file = settings.data_dir / job_folder(job.id) / "text.txt"
    assert start.text_path == str(file)
    assert file.read_text() == TEXT
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    build_start(db, job, device="cpu", settings=settings)
    assert file.read_text() == TEXT
    written = file.stat().st_mtime_ns
    build_start(db, job, device="cpu", settings=settings)
    assert file.stat().st_mtime_ns == written


@ONLY_SQLITE
def test_a_job_that_starts_again_at_step_0_keeps_the_tokenizer_of_its_checkpoints(
    db: Database, settings: Settings
) -> None:
    claim = claimed(db)
    assert build_start(db, claim.job, device="cpu", settings=settings)[0].tokenizer is None
    for percent in (0, 25):
        made = write_tiny_checkpoint(
            settings.data_dir / checkpoint_folder(claim.job_id, claim.fence, percent), seed=percent
        )
        recording.record_checkpoint(
            db, claim, percent=percent, step=percent, epoch=0, manifest_sha256=made.manifest_sha256,
            folder=checkpoint_folder(claim.job_id, claim.fence, percent), files=[], metrics={},
        )  # fmt: skip
    queue.release(db, claim)
    again = queue.claim(db, WorkerIdentity(), 60)
    assert again is not None
    first, second = (settings.data_dir / row.folder for row in reads.list_checkpoints(db, claim.job_id))
    for damaged, expected in ((None, first), (first, second), (second, None)):
        if damaged is not None:
            (damaged / "tokenizer.json").write_bytes(b"{}")
        found = build_start(db, again.job, device="cpu", settings=settings)[0].tokenizer
        assert (found and found.folder) == (expected and str(expected))


@ONLY_SQLITE
def test_the_lease_is_renewed_while_a_snapshot_is_read_for_longer_than_it(place: Workplace) -> None:
    job = place.submit()
    first = place.start_worker("work", timing=SHORT_LEASE)
    place.wait_for_step(job, 5)
    queue.request_pause(place.db, job.id)
    place.wait_for(job, "paused")
    snapshot = reads.find_snapshot(place.db, job.id)
    assert snapshot is not None
    first.signal(signal.SIGTERM)
    first.wait()
    place.start_worker("work", timing=SHORT_LEASE, slow_disk_seconds=1.5 * SHORT_LEASE.lease)
    queue.resume(place.db, job.id)
    place.wait_for_step(job, snapshot.step + 1)
    place.finish(job)
    done = place.wait_for(job, "succeeded")
    assert (done.attempt, done.crashes) == (2, 0)
    assert place.events(job, "warning") == [
        {"code": "resumed", "message": f"attempt 2 goes on from step {snapshot.step}"}
    ]
