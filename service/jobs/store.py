"""What is read from the tables, and what is written that touches no job's status: workers and the installation.

Knows no HTTP, no torch and no transition (`queue.py`). The worker finds here, too, the tables and the opening of the
database, which live in `tables.py` and `database.py`.
"""

import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlmodel import Session, col, select

from nanomoe import checkpoint
from service.database.database import REVISION, Database, open_database
from service.errors import NotFound, NotInstalled, StartRefused
from service.jobs.series import MIN_POINTS, read_series, read_steps_after
from service.jobs.tables import (
    PERCENTS,
    SERIES,
    STATUSES,
    TERMINAL,
    Checkpoint,
    Event,
    Installation,
    Job,
    Snapshot,
    Step,
    StepBlock,
    Text,
    Worker,
    new_id,
    table,
)
from service.storage.orphans import sweep_orphans

__all__ = [
    "MIN_POINTS",
    "PERCENTS",
    "REVISION",
    "SERIES",
    "STATUSES",
    "TERMINAL",
    "Checkpoint",
    "Database",
    "Event",
    "Installation",
    "Job",
    "Snapshot",
    "Step",
    "StepBlock",
    "Text",
    "Worker",
    "WorkerIdentity",
    "checkpoint_folder",
    "count_jobs",
    "events_after",
    "find_snapshot",
    "get_checkpoint",
    "get_job",
    "get_text",
    "is_alive",
    "is_gone",
    "job_folder",
    "join_installation",
    "list_checkpoints",
    "list_jobs",
    "list_workers",
    "new_id",
    "open_database",
    "relabel",
    "series",
    "snapshot_folder",
    "steps_after",
    "sweep_orphans",
    "worker_seen",
    "worker_started",
    "worker_stopped",
]

WORKER_KEPT = timedelta(days=1)
"""How long a worker that is no longer seen stays in the list."""


# Where files lie, relative to the data folder


def job_folder(job_id: str) -> str:
    """The folder of a job's files."""
    return f"jobs/{job_id}"


def checkpoint_folder(job_id: str, fence: int, percent: int) -> str:
    """The folder of a checkpoint."""
    return f"{job_folder(job_id)}/{checkpoint.folder_name(fence, percent)}"


def snapshot_folder(job_id: str, fence: int, step: int) -> str:
    """The folder of a snapshot to resume from."""
    return f"{job_folder(job_id)}/{checkpoint.snapshot_name(fence, step)}"


# Jobs


def get_job(db: Database, job_id: str) -> Job:
    """Raises NotFound `job_not_found`."""
    with db.read() as session:
        return load_job(session, job_id)


def load_job(session: Session, job_id: str) -> Job:
    """`get_job` within a transaction."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    return job


def list_jobs(
    db: Database,
    *,
    status: str | None = None,
    tag: tuple[str, str | None] | None = None,
    owner: str | None = None,
    before: int | None = None,
    limit: int = 50,
) -> list[Job]:
    """The newest jobs first; `before` is the `seq` of the last one of the page before, so inserts do not shift pages.

    `tag`: its key, which must have no quotes, and its value; a value of None stands for any.
    """
    query = select(Job).order_by(col(Job.seq).desc()).limit(limit)
    if status is not None:
        query = query.where(col(Job.status) == status)
    if tag is not None:
        key, value = tag
        stored = table(Job).c.tags[key].as_string()
        query = query.where(stored.is_not(None) if value is None else stored == value)
    if owner is not None:
        query = query.where(col(Job.owner) == owner)
    if before is not None:
        query = query.where(col(Job.seq) < before)
    with db.read() as session:
        return list(session.exec(query))


def relabel(db: Database, job_id: str, changes: Mapping[str, Any]) -> Job:
    """Change a job's `name`, its `tags`, or both. Raises NotFound `job_not_found`."""
    assert changes.keys() <= {"name", "tags"}
    with db.write() as session:
        job = load_job(session, job_id)
        for field, value in changes.items():
            setattr(job, field, value)
        return job


def count_jobs(db: Database) -> dict[str, int]:
    """How many jobs have each status; every status is a key."""
    with db.read() as session:
        counts = dict(
            session.execute(sa.select(table(Job).c.status, sa.func.count()).group_by(table(Job).c.status)).all()
        )
    return {status: counts.get(status, 0) for status in STATUSES}


def get_text(db: Database, sha256: str) -> bytes:
    """A training text as UTF-8. Raises NotFound `text_not_found`."""
    with db.read() as session:
        text = session.get(Text, sha256)
    if text is None:
        raise NotFound("text_not_found", f"there is no text {sha256}")
    return text.content


# What a job recorded


def list_checkpoints(db: Database, job_id: str) -> list[Checkpoint]:
    """By percent. Raises NotFound `job_not_found`."""
    with db.read() as session:
        load_job(session, job_id)
        query = select(Checkpoint).where(col(Checkpoint.job_id) == job_id).order_by(col(Checkpoint.percent))
        return list(session.exec(query))


def get_checkpoint(db: Database, job_id: str, percent: int | Literal["latest"]) -> Checkpoint:
    """Raises NotFound `job_not_found`, `checkpoint_not_found`."""
    with db.read() as session:
        load_job(session, job_id)
        query = select(Checkpoint).where(col(Checkpoint.job_id) == job_id).order_by(col(Checkpoint.percent).desc())
        if percent != "latest":
            query = query.where(col(Checkpoint.percent) == percent)
        found = session.exec(query.limit(1)).first()
    if found is None:
        raise NotFound("checkpoint_not_found", f"job {job_id} has no checkpoint {percent} yet")
    return found


def find_snapshot(db: Database, job_id: str) -> Snapshot | None:
    """The state to resume from, if one was recorded."""
    with db.read() as session:
        return session.get(Snapshot, job_id)


def series(db: Database, job_id: str, points: int = 1000) -> dict[str, list[Any]]:
    """The step series by column, thinned to at most `points` steps that keep the extremes.

    Raises ValueError for fewer points than `MIN_POINTS`.
    """
    with db.read() as session:
        return read_series(session, job_id, points)


def steps_after(db: Database, job_id: str, step: int, limit: int) -> list[sa.Row[Any]]:
    """The next `limit` rows (step, train_loss, lr, grad_norm) past `step`."""
    with db.read() as session:
        return read_steps_after(session, job_id, step, limit)


def events_after(db: Database, job_id: str, seq: int, limit: int = 1000) -> list[Event]:
    """The next `limit` events past number `seq`, oldest first."""
    query = select(Event).where(col(Event.job_id) == job_id, col(Event.seq) > seq).order_by(col(Event.seq))
    with db.read() as session:
        return list(session.exec(query.limit(limit)))


# Workers


@dataclass(frozen=True)
class WorkerIdentity:
    """One boot of a worker: what `GET /workers` tells of it, and which jobs it can hold."""

    name: str = field(default_factory=platform.node)
    devices: Sequence[dict[str, Any]] = ()
    """`{"device", "name", "memory_bytes"}` of each."""

    slots: int = 1
    lease_seconds: float = 60.0
    """Length of its leases, and how long after it was last seen it counts as alive."""

    versions: dict[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    """Jobs that need more are left to others; None takes every job."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Random for every boot: a stable name is not a fence."""


def worker_started(db: Database, worker: WorkerIdentity) -> None:
    """Enter this boot into the list, and forget those not seen for a day."""
    workers = table(Worker)
    with db.write() as session:
        session.execute(sa.delete(workers).where(workers.c.last_seen_at < db.after(-WORKER_KEPT.total_seconds())))
        values = {
            "id": worker.id,
            "name": worker.name,
            "host": platform.node(),
            "pid": os.getpid(),
            "slots": worker.slots,
            "lease_seconds": worker.lease_seconds,
            "devices": list(worker.devices),
            "versions": worker.versions,
            "started_at": db.now,
            "last_seen_at": db.now,
            "stopped_at": None,
        }
        session.execute(sa.insert(workers).values(**values))


def worker_seen(db: Database, worker_id: str) -> None:
    """Say that this boot is alive: while it is, a lease that passed is not counted as a crash."""
    workers = table(Worker)
    with db.write() as session:
        session.execute(sa.update(workers).where(workers.c.id == worker_id).values(last_seen_at=db.now))


def worker_stopped(db: Database, worker_id: str) -> None:
    """Say that this boot has ended."""
    workers = table(Worker)
    with db.write() as session:
        session.execute(sa.update(workers).where(workers.c.id == worker_id).values(stopped_at=db.now))


def is_alive(worker: Worker, now: datetime) -> bool:
    """Whether a worker was seen within the length of its own leases, several heartbeats, and has not stopped. One that
    was seen further in the future than that was seen by a clock that has been set back, and not since. `now` is the
    database's."""
    return not is_gone(worker, now) and worker.last_seen_at - now < timedelta(seconds=worker.lease_seconds)


def is_gone(worker: Worker, now: datetime) -> bool:
    """Whether a worker has stopped, or was not seen for the length of its own leases. Of one that was seen in the
    future nobody can tell. `now` is the database's."""
    return worker.stopped_at is not None or now - worker.last_seen_at >= timedelta(seconds=worker.lease_seconds)


def list_workers(db: Database) -> list[tuple[Worker, list[Job]]]:
    """The workers, the last seen first, each with the jobs it runs."""
    with db.read() as session:
        running: dict[str, list[Job]] = {}
        for job in session.exec(select(Job).where(col(Job.status) == "running").order_by(col(Job.seq))):
            running.setdefault(str(job.worker_id), []).append(job)
        workers = session.exec(select(Worker).order_by(col(Worker.last_seen_at).desc(), col(Worker.id)))
        return [(worker, running.get(worker.id, [])) for worker in workers]


def has_training(db: Database) -> bool:
    """Whether a worker is alive, or a job waits or runs."""
    now = db.time()
    with db.read() as session:
        if session.exec(select(Job.id).where(col(Job.status).in_(("queued", "running"))).limit(1)).first() is not None:
            return True
        workers = session.exec(select(Worker).where(col(Worker.stopped_at).is_(None)))
        return any(is_alive(worker, now) for worker in workers)


# The installation


def join_installation(db: Database, data_dir: Path, *, create: bool = False) -> str:
    """Make sure that database and data folder belong together, by the id that both carry; returns it.

    `create` (the API, once it has migrated) gives a new pair its id; a worker only compares. Raises StartRefused when
    they differ, or when only one of them has an id; NotInstalled when it may only be too early to compare: the API
    commits the schema first, then writes the file, then the database's id.
    """
    file = data_dir / "installation"
    with db.write() if create else db.read() as session:
        if create and not db.is_sqlite:  # one at a time; SQLite has one writer anyway
            session.execute(sa.text("LOCK TABLE installation IN EXCLUSIVE MODE"))
        on_disk = file.read_text(encoding="ascii").strip() if file.exists() else None
        in_database = session.exec(select(Installation.id)).first()
        if create and in_database is None and (on_disk is None or not _has_jobs(data_dir)):
            in_database = on_disk or uuid.uuid4().hex
            # The file first: should the commit fail, the next start finds a folder without jobs and adopts its id.
            _write_durably(file, in_database)
            on_disk = in_database
            session.execute(sa.insert(table(Installation)).values(id=in_database, created_at=db.now))
    if in_database is None and not create:
        raise NotInstalled("the database has no installation id yet: the API gives it one when it starts")
    if in_database is None or in_database != on_disk:
        raise StartRefused(
            f"the database (installation {in_database}) and the data folder {data_dir} (installation {on_disk}) "
            "do not belong together: check NANOMOE_DATABASE_URL and NANOMOE_DATA_DIR"
        )
    return in_database


def _has_jobs(data_dir: Path) -> bool:
    jobs = data_dir / "jobs"
    return jobs.is_dir() and any(jobs.iterdir())


def _write_durably(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="ascii") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
