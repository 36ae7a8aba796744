"""Files and folders of the store that no row refers to: those of a process that died before it wrote its row, and those
of deleted jobs. Finds them, and deletes them after a day.

Deletes nothing outside of `jobs/`, nothing whose name is not one that this project gives, and nothing that the current
claim of a running job has written. Knows no HTTP and no torch; database and store must belong together
(`installation.join_installation`).
"""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

import sqlalchemy as sa

from nanomoe.checkpoint import FOLDER_NAME
from nanomoe.config import JOB_ID_PATTERN
from nanomoe.store.local import UNFINISHED, LocalStore
from nanomoe.store.store import Store
from service.database.database import Database
from service.database.schema import table
from service.jobs.tables import Checkpoint, Job, Snapshot

SWEEP_AFTER = timedelta(days=1)
"""How long files without a row stay: time to notice that the wrong database was restored."""

_FENCED = re.compile(rf"{FOLDER_NAME}({re.escape(UNFINISHED)})?|text\.f(\d+)\.tmp")
"""Names that a claim gives in its job's folder: checkpoints and snapshots, complete or not, and an incomplete text."""

_SCRATCH = re.compile(rf"{JOB_ID_PATTERN.strip('^$')}/(text\.txt|text\.f\d+\.tmp|files{re.escape(UNFINISHED)})")
"""What lies in the data folder while a job is trained or imported, wherever its files are kept."""


def find_orphans(db: Database, store: Store) -> list[str]:
    """Files and folders without a row, sorted, relative to the store: all files of a job that is not in the database,
    and files of earlier claims of other jobs.

    Raises DatabaseUnavailable, StoreError.
    """
    # The files first: a row is written after its files, so what lay here before the rows are read either has its row
    # by then, or belongs to the claim that is writing it, or will never have one.
    there = list(_entries(store))
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


def sweep_orphans(db: Database, store: Store, *, older_than: timedelta = SWEEP_AFTER) -> list[str]:
    """Remove the orphans that nothing was written to for that long, by the host's clock; returns them, relative to the
    store. What cannot be removed stays for the next time. Safe while API and workers run.

    Raises DatabaseUnavailable, StoreError.
    """
    last = time.time() - older_than.total_seconds()
    swept = []
    for name in find_orphans(db, store):
        folder = store / name
        if folder.last_change() > last:
            continue
        folder.remove()
        if not folder.last_change():
            swept.append(name)
    return swept


def sweep_scratch(db: Database, data_folder: LocalStore, *, older_than: timedelta = SWEEP_AFTER) -> list[str]:
    """Where the files of jobs lie in a bucket: remove from the data folder what was only made there to be trained or
    imported, of jobs that do not run and to which nothing was written for that long; returns it, relative to the data
    folder. Checkpoints that may lie there, of the time before the bucket, stay.

    Raises DatabaseUnavailable.
    """
    last = time.time() - older_than.total_seconds()
    there = [entry.path for entry in (data_folder / "jobs").entries(2) if _SCRATCH.fullmatch(entry.path)]
    with db.read() as session:
        jobs = table(Job)
        running = set(session.scalars(sa.select(jobs.c.id).where(jobs.c.status == "running")))
    swept = []
    for path in there:
        job_id, _, _ = path.partition("/")
        scratch = data_folder / "jobs" / path
        if job_id not in running and scratch.last_change() <= last:
            scratch.remove()
            swept.append(f"jobs/{path}")
            with suppress(OSError):  # something else lies there
                (data_folder.folder / "jobs" / job_id).rmdir()
    return sorted(swept)


def _entries(store: Store) -> Iterator[tuple[str, str, int | None]]:
    """Job id, path and fence of everything that may be an orphan; no fence for the folder of a job itself."""
    for entry in (store / "jobs").entries(2):
        job_id, _, name = entry.path.partition("/")
        if re.fullmatch(JOB_ID_PATTERN, job_id) is None:
            continue
        if not name and entry.is_folder:
            yield job_id, f"jobs/{job_id}", None
        elif (made := _FENCED.fullmatch(name)) is not None:
            yield job_id, f"jobs/{entry.path}", int(made[1] or made[3])
