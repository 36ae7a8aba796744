"""A job as a worker leaves it in the middle: checkpoints and a snapshot, rows and files."""

from pathlib import Path

from nanomoe import checkpoint
from service.database.database import Database
from service.jobs import queue, recording
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity
from service.storage.job_folders import checkpoint_folder, job_folder

FILES = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 4}


def job_with_files(db: Database, data: Path) -> Claim:
    """A running job with the checkpoints 0 and 25, and a snapshot at step 9."""
    submit_job(db, NewJob(text="a b", config={}))
    claim = queue.claim(db, WorkerIdentity(), 60)
    assert claim is not None
    for percent in (0, 25):
        folder = checkpoint_folder(claim.job_id, claim.fence, percent)
        manifest, sha256 = checkpoint.write(data / folder, FILES)
        recording.record_checkpoint(
            db, claim, percent=percent, step=percent, epoch=percent, folder=folder, manifest_sha256=sha256,
            files=[entry.model_dump() for entry in manifest.files], metrics={"loss": 1.0},
        )  # fmt: skip
    snapshot(db, data, claim, 9)
    return claim


def snapshot_folder(job_id: str, fence: int, step: int) -> str:
    """The folder of a snapshot, relative to the data folder."""
    return f"{job_folder(job_id)}/{checkpoint.snapshot_name(fence, step)}"


def snapshot(db: Database, data: Path, claim: Claim, step: int) -> Path:
    folder = snapshot_folder(claim.job_id, claim.fence, step)
    _, sha256 = checkpoint.write(data / folder, {"resume.json": b"{}"})
    recording.record_snapshot(db, claim, step=step, folder=folder, manifest_sha256=sha256)
    return data / folder
