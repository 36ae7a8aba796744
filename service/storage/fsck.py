"""Whether every checkpoint and snapshot in the database lies in the store, byte for byte: the check of `nanomoe fsck`.

Changes nothing, and may run beside API and workers. Knows no HTTP, no terminal and no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.orm import defer
from sqlmodel import col, select

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.store.store import Store
from service.database.database import Database
from service.errors import StartRefused
from service.jobs.tables import Checkpoint, Snapshot
from service.storage.installation import join_installation
from service.storage.orphans import find_orphans


@dataclass(frozen=True)
class Fault:
    """A difference between what was recorded and what is there."""

    kind: Literal["missing", "damaged", "database", "installation"]
    """`missing`: a row without its folder. `damaged`: a file is not what was written. `database`: a check of
    the database failed. `installation`: database and store do not belong together."""

    message: str
    """What is wrong, with the name of the file."""

    job_id: str | None = None
    percent: int | None = None
    """Percent of a checkpoint; None for a snapshot."""

    folder: str | None = None
    """Relative to the store."""


@dataclass
class Report:
    """The result of a check."""

    n_checkpoints: int = 0
    n_snapshots: int = 0
    n_bytes: int = 0
    """Bytes read and compared, manifests not counted."""

    faults: list[Fault] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    """Files and folders without a row, relative to the store: no fault, they are swept after a day."""

    @property
    def is_clean(self) -> bool:
        """Whether everything recorded is there."""
        return not self.faults


def check(db: Database, store: Store) -> Report:
    """Compare the database with itself, and every checkpoint and snapshot with its files.

    Where database and store do not belong together, that is the only fault. Raises DatabaseUnavailable, SchemaMismatch,
    StoreError.
    """
    db.check_revision()
    report = Report()
    try:
        join_installation(db, store)
    except StartRefused as error:
        report.faults.append(Fault("installation", str(error)))
        return report
    report.faults += [Fault("database", message) for message in _database_faults(db)]
    for row in _rows(db):
        _check_row(db, store, row, report)
    report.orphans = find_orphans(db, store)
    return report


def _database_faults(db: Database) -> Iterator[str]:
    """Faults that SQLite's own checks find. PostgreSQL enforces foreign keys, and checks pages by data checksums."""
    if not db.is_sqlite:
        return
    with db.read() as session:
        for (message,) in session.execute(sa.text("PRAGMA integrity_check")):
            if message != "ok":
                yield f"integrity_check: {message}"
        for child, row, parent, _ in session.execute(sa.text("PRAGMA foreign_key_check")):
            yield f"row {row} of {child} refers to no row of {parent}"


def _rows(db: Database) -> list[Checkpoint | Snapshot]:
    """All checkpoints and snapshots, by job; without the metrics of a checkpoint, which may be large."""
    with db.read() as session:
        order = (col(Checkpoint.job_id), col(Checkpoint.percent))
        checkpoints = session.exec(
            select(Checkpoint)
            .order_by(*order)
            .options(
                defer(Checkpoint.metrics)  # type: ignore[arg-type]
            )
        ).all()
        snapshots = session.exec(select(Snapshot).order_by(col(Snapshot.job_id))).all()
    return [*checkpoints, *snapshots]


def _check_row(db: Database, store: Store, row: Checkpoint | Snapshot, report: Report) -> None:
    """Verify one row's files. A job that goes on replaces its snapshot, and one may be deleted: what fails is looked up
    again, and counts only if the row is still the same."""
    while (fault := _verify(store, row, report)) is not None:
        newer = _reread(db, row)
        if newer is None:
            return
        if (newer.folder, newer.manifest_sha256) == (row.folder, row.manifest_sha256):
            report.faults.append(fault)
            break
        row = newer
    if isinstance(row, Checkpoint):
        report.n_checkpoints += 1
    else:
        report.n_snapshots += 1


def _reread(db: Database, row: Checkpoint | Snapshot) -> Checkpoint | Snapshot | None:
    with db.read() as session:
        if isinstance(row, Checkpoint):
            return session.get(Checkpoint, (row.job_id, row.percent))
        return session.get(Snapshot, row.job_id)


def _verify(store: Store, row: Checkpoint | Snapshot, report: Report) -> Fault | None:
    percent, files = (row.percent, row.files) if isinstance(row, Checkpoint) else (None, None)
    what = f"the snapshot of step {row.step}" if percent is None else f"checkpoint {percent}"
    folder = store / row.folder
    if not folder.exists():
        return Fault("missing", f"{what}: there is no folder {row.folder}", row.job_id, percent, row.folder)
    try:
        manifest = checkpoint.verify(folder, row.manifest_sha256)
    except CheckpointDamaged as error:
        return Fault("damaged", f"{what}: {error}", row.job_id, percent, row.folder)
    if files is not None and [entry.model_dump() for entry in manifest.files] != files:
        return Fault("damaged", f"{what}: the row lists other files than its manifest", row.job_id, percent, row.folder)
    report.n_bytes += sum(entry.size for entry in manifest.files)
    return None
