"""The start message of an attempt: the text as a file, the snapshot to resume from, the weights to start from.

A snapshot is verified byte by byte first: where it is damaged, the job starts again. The trainer verifies what else it
reads. Knows no process and writes nothing to the database.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import JobConfig
from nanomoe.lineage import ParentUnusable
from service.database.database import Database
from service.errors import NotFound
from service.jobs import reads
from service.jobs.tables import Job, Snapshot
from service.settings import Settings
from service.storage.job_folders import job_folder
from worker.protocol import Folder, Start, Warned


def build_start(
    db: Database, job: Job, *, device: str, settings: Settings, meanwhile: Callable[[], None] = lambda: None
) -> tuple[Start, str | None, list[Warned]]:
    """The start message of an attempt, the recorded snapshot's folder (relative to the data folder), and warnings for
    the user. `meanwhile` is called again and again, every few milliseconds, while large files are verified.

    Raises ParentUnusable, DatabaseUnavailable, OSError when the text cannot be written, and what `meanwhile` raises.
    """
    folder = settings.data_dir / job_folder(job.id)
    folder.mkdir(parents=True, exist_ok=True)
    config = JobConfig.model_validate(job.config)
    is_first = job.attempt == 1
    snapshot = None if is_first else reads.find_snapshot(db, job.id)
    resume, warnings = _verified(snapshot, settings.data_dir, meanwhile)
    parent = _find_parent(db, config, settings.data_dir) if resume is None else None
    start = Start(
        job_id=job.id,
        fence=job.fence,
        config=config,
        text_path=str(_write_text(db, job, folder)),
        folder=str(folder),
        execution=job.execution,
        resume=resume,
        parent=parent,
        tokenizer=None if is_first or resume or parent else _find_tokenizer(db, job, settings.data_dir),
        device=device,
        snapshot_seconds=settings.snapshot_seconds,
        allow_hub=settings.allow_hub,
        tokenizer_dir=None if settings.tokenizer_dir is None else str(settings.tokenizer_dir),
    )
    return start, None if snapshot is None else snapshot.folder, warnings


def _verified(
    snapshot: Snapshot | None, data_dir: Path, meanwhile: Callable[[], None]
) -> tuple[Folder | None, list[Warned]]:
    if snapshot is None:
        return None, []
    found = Folder(folder=str(data_dir / snapshot.folder), manifest_sha256=snapshot.manifest_sha256)
    try:
        checkpoint.verify(Path(found.folder), found.manifest_sha256, meanwhile=meanwhile)
    except CheckpointDamaged as error:
        message = f"the snapshot of step {snapshot.step} is damaged, training starts again at step 0: {error}"
        return None, [Warned(code="snapshot_damaged", message=message)]
    return found, []


def _find_parent(db: Database, config: JobConfig, data_dir: Path) -> Folder | None:
    """The checkpoint in `init_from`. The trainer verifies its bytes as it reads them, and reads them once."""
    if config.init_from is None:
        return None
    try:
        row = reads.get_checkpoint(db, config.init_from.job_id, config.init_from.checkpoint)
    except NotFound as error:
        raise ParentUnusable(config.init_from, error) from error
    return Folder(folder=str(data_dir / row.folder), manifest_sha256=row.manifest_sha256)


def _find_tokenizer(db: Database, job: Job, data_dir: Path) -> Folder | None:
    """The first undamaged checkpoint that an earlier attempt recorded: its files hold the tokenizer that the job began
    with, whose name may stand for another by now."""
    for row in reads.list_checkpoints(db, job.id):
        found = Folder(folder=str(data_dir / row.folder), manifest_sha256=row.manifest_sha256)
        try:
            checkpoint.open(Path(found.folder), found.manifest_sha256).tokenizer()
        except CheckpointDamaged:
            continue
        return found
    return None


def _write_text(db: Database, job: Job, folder: Path) -> Path:
    """The text as a file: that of an earlier attempt if every byte of it is right, else written anew."""
    path = folder / "text.txt"
    if not path.exists() or _sha256(path) != job.text_sha256:
        unfinished = folder / f"text.f{job.fence}.tmp"
        # Not flushed to the disk: a later attempt compares every byte.
        unfinished.write_bytes(reads.get_text(db, job.text_sha256))
        unfinished.replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
