"""The start message of an attempt: the text as a file, the snapshot to resume from, the weights to start from.

A snapshot is verified byte by byte first: where it is damaged, the job starts again; where the store is out of reach,
the attempt ends. From a bucket it is copied into this machine's cache so. The trainer verifies what else it reads.
Knows no process and writes nothing to the database.
"""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.config import JobConfig
from nanomoe.lineage import ParentUnusable
from nanomoe.store.store import Store
from service.database.database import Database
from service.errors import NotFound
from service.jobs import reads
from service.jobs.tables import Job, Snapshot
from service.settings import Settings
from service.storage.job_folders import job_folder
from service.storage.opening import cache_of, open_store
from worker.protocol import Folder, Start, Warned

_TICK = 0.05
"""Seconds between two calls of `meanwhile` while a bucket is read."""


def build_start(
    db: Database, job: Job, *, device: str, settings: Settings, meanwhile: Callable[[], None] = lambda: None
) -> tuple[Start, str | None, list[Warned]]:
    """The start message of an attempt, the recorded snapshot's folder (relative to the store), and warnings for the
    user. `meanwhile` is called again and again, every few milliseconds, while files are verified.

    Raises ParentUnusable, DatabaseUnavailable, StoreError, OSError when the text cannot be written, and what
    `meanwhile` raises.
    """
    store = open_store(settings)
    folder = settings.data_dir / job_folder(job.id)
    folder.mkdir(parents=True, exist_ok=True)
    config = JobConfig.model_validate(job.config)
    is_first = job.attempt == 1
    snapshot = None if is_first else reads.find_snapshot(db, job.id)
    resume, warnings = _verified(snapshot, store, meanwhile)
    parent = _find_parent(db, config, store) if resume is None else None
    start = Start(
        job_id=job.id,
        fence=job.fence,
        config=config,
        text_path=str(_write_text(db, job, folder)),
        folder=(store / job_folder(job.id)).location,
        execution=job.execution,
        resume=resume,
        parent=parent,
        tokenizer=None if is_first or resume or parent else _find_tokenizer(db, job, store, meanwhile),
        device=device,
        snapshot_seconds=settings.snapshot_seconds,
        allow_hub=settings.allow_hub,
        tokenizer_dir=None if settings.tokenizer_dir is None else str(settings.tokenizer_dir),
        cache=cache_of(settings),
    )
    return start, None if snapshot is None else snapshot.folder, warnings


def _verified(
    snapshot: Snapshot | None, store: Store, meanwhile: Callable[[], None]
) -> tuple[Folder | None, list[Warned]]:
    if snapshot is None:
        return None, []
    folder, sha256 = store / snapshot.folder, snapshot.manifest_sha256
    try:
        _read(folder, partial(_verify, folder, sha256), meanwhile)
    except CheckpointDamaged as error:
        message = f"the snapshot of step {snapshot.step} is damaged, training starts again at step 0: {error}"
        return None, [Warned(code="snapshot_damaged", message=message)]
    return Folder(folder=folder.location, manifest_sha256=sha256), []


def _find_parent(db: Database, config: JobConfig, store: Store) -> Folder | None:
    """The checkpoint in `init_from`. The trainer verifies its bytes as it reads them, and reads them once."""
    if config.init_from is None:
        return None
    try:
        row = reads.get_checkpoint(db, config.init_from.job_id, config.init_from.checkpoint)
    except NotFound as error:
        raise ParentUnusable(config.init_from, error) from error
    return Folder(folder=(store / row.folder).location, manifest_sha256=row.manifest_sha256)


def _find_tokenizer(db: Database, job: Job, store: Store, meanwhile: Callable[[], None]) -> Folder | None:
    """The first undamaged checkpoint that an earlier attempt recorded: its files hold the tokenizer that the job began
    with, whose name may stand for another by now."""
    for row in reads.list_checkpoints(db, job.id):
        folder, sha256 = store / row.folder, row.manifest_sha256
        try:
            _read(folder, partial(_read_tokenizer, folder, sha256), meanwhile)
        except CheckpointDamaged:
            continue
        return Folder(folder=folder.location, manifest_sha256=sha256)
    return None


def _verify(folder: Store, manifest_sha256: str, piece_read: Callable[[], None]) -> None:
    checkpoint.verify(folder, manifest_sha256, meanwhile=piece_read, to_be_read=True)


def _read_tokenizer(folder: Store, manifest_sha256: str, _: Callable[[], None]) -> None:
    checkpoint.open(folder, manifest_sha256).tokenizer()


def _read(folder: Store, read: Callable[[Callable[[], None]], object], meanwhile: Callable[[], None]) -> None:
    """Call `read` with what it calls after each piece, and `meanwhile` again and again until it returns.

    A bucket may say nothing for minutes: it is read in a thread of its own, which ends at its next piece once
    `meanwhile` has raised.
    """
    if folder.is_local:
        read(meanwhile)
        return
    outcome: Future[None] = Future()
    given_up = threading.Event()

    def piece_read() -> None:
        if given_up.is_set():
            raise InterruptedError("nobody waits for it any more")

    def work() -> None:
        try:
            read(piece_read)
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=work, name="reader", daemon=True).start()
    try:
        while not wait([outcome], timeout=_TICK).done:
            meanwhile()
    except BaseException:
        given_up.set()
        raise
    outcome.result()


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
