"""A job as a worker leaves it in the middle: checkpoints and a snapshot, rows and files."""

from pathlib import Path

from nanomoe import checkpoint
from service.database.database import Database
from service.jobs import queue, store
from service.jobs.queue import Claim, NewJob
from service.jobs.store import WorkerIdentity

FILES = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 4}


def job_with_files(db: Database, data: Path) -> Claim:
    """A running job with the checkpoints 0 and 25, and a snapshot at step 9."""
    queue.submit(db, NewJob(text="a b", config={}))
    claim = queue.claim(db, WorkerIdentity(), 60)
    assert claim is not None
    for percent in (0, 25):
        folder = store.checkpoint_folder(claim.job_id, claim.fence, percent)
        manifest, sha256 = checkpoint.write(data / folder, FILES)
        queue.record_checkpoint(
            db, claim, percent=percent, step=percent, epoch=percent, folder=folder, manifest_sha256=sha256,
            files=[entry.model_dump() for entry in manifest.files], metrics={"loss": 1.0},
        )  # fmt: skip
    snapshot(db, data, claim, 9)
    return claim


def snapshot(db: Database, data: Path, claim: Claim, step: int) -> Path:
    folder = store.snapshot_folder(claim.job_id, claim.fence, step)
    _, sha256 = checkpoint.write(data / folder, {"resume.json": b"{}"})
    queue.record_snapshot(db, claim, step=step, folder=folder, manifest_sha256=sha256)
    return data / folder
