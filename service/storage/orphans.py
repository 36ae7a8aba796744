"""Files and folders of the data folder that no row refers to: those of a process that died before it wrote its row, and
those of deleted jobs. Finds them, and deletes them after a day.

Deletes nothing outside of `<data>/jobs/`, nothing whose name is not one that this project gives, and nothing that the
current claim of a running job has written. Knows no HTTP and no torch; database and data folder must belong together
(`installation.join_installation`).
"""

import re
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa

from nanomoe.checkpoint import FOLDER_NAME, UNFINISHED
from nanomoe.config import JOB_ID_PATTERN
from service.database.database import Database
from service.database.schema import table
from service.jobs.tables import Checkpoint, Job, Snapshot

SWEEP_AFTER = timedelta(days=1)
"""How long files without a row stay: time to notice that the wrong database was restored."""

_FENCED = re.compile(rf"{FOLDER_NAME}({re.escape(UNFINISHED)})?|text\.f(\d+)\.tmp")
"""Names that a claim gives in its job's folder: checkpoints and snapshots, complete or not, and an incomplete text."""


def find_orphans(db: Database, data_dir: Path) -> list[str]:
    """Files and folders without a row, sorted, relative to the data folder: all files of a job that is not in the
    database, and files of earlier claims of other jobs.

    Raises DatabaseUnavailable.
    """
    # The files first: a row is written after its files, so what lay here before the rows are read either has its row
    # by then, or belongs to the claim that is writing it, or will never have one.
    there = list(_entries(data_dir))
    with db.read() as session:
        jobs = table(Job)
        fences = {
            row.id: row.fence if row.status == "running" else None
            for row in session.execute(sa.select(jobs.c.id, jobs.c.fence, jobs.c.status))
        }
        folders = sa.union_all(*(sa.select(table(row).c.folder) for row in (Checkpoint, Snapshot)))
        recorded = set(session.scalars(folders))
    return sorted(
        path
        for job_id, path, fence in there
        if (fence is None and job_id not in fences)
        or (fence is not None and job_id in fences and path not in recorded and fence != fences[job_id])
    )


def sweep_orphans(db: Database, data_dir: Path, *, older_than: timedelta = SWEEP_AFTER) -> list[str]:
    """Remove the orphans that nothing was written to for that long, by the host's clock; returns them, relative to the
    data folder. What cannot be removed stays for the next time. Safe while API and workers run.

    Raises DatabaseUnavailable.
    """
    last = time.time() - older_than.total_seconds()
    swept = []
    for name in find_orphans(db, data_dir):
        path = data_dir / name
        if _newest_change(path) > last:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not path.exists():
            swept.append(name)
    return swept


def _entries(data_dir: Path) -> Iterator[tuple[str, str, int | None]]:
    """Job id, path and fence of everything that may be an orphan; no fence for the folder of a job itself."""
    root = data_dir / "jobs"
    for folder in root.iterdir() if root.is_dir() else ():
        # We never make a link, and what it points to is not ours to delete.
        if re.fullmatch(JOB_ID_PATTERN, folder.name) is None or folder.is_symlink() or not folder.is_dir():
            continue
        yield folder.name, f"jobs/{folder.name}", None
        for entry in _listed(folder):
            if (made := _FENCED.fullmatch(entry.name)) is not None and not entry.is_symlink():
                yield folder.name, f"jobs/{folder.name}/{entry.name}", int(made[1] or made[3])


def _newest_change(path: Path) -> float:
    """When something in the first two levels of `path` was last written, in seconds since 1970; 0 if it is gone."""
    newest = 0.0
    for entry in (path, *_listed(path), *(below for folder in _listed(path) for below in _listed(folder))):
        try:
            newest = max(newest, entry.lstat().st_mtime)
        except FileNotFoundError:
            continue  # removed while we looked
    return newest


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []  # removed while we looked, or a file
