"""Workers: the row of each boot, whether it is alive, and what it runs."""

import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select

from service.database.database import Database
from service.database.schema import table
from service.jobs.tables import Job, Worker

WORKER_KEPT = timedelta(days=1)
"""How long a worker that is no longer seen stays in the list."""


@dataclass(frozen=True)
class WorkerIdentity:
    """One boot of a worker: what `GET /workers` shows of it, and which jobs it can claim."""

    name: str = field(default_factory=platform.node)
    devices: Sequence[dict[str, Any]] = ()
    """`{"device", "name", "memory_bytes"}` of each device."""

    slots: int = 1
    lease_seconds: float = 60.0
    """Length of its leases, and how long after it was last seen it counts as alive."""

    versions: dict[str, str] = field(default_factory=dict)
    cohort: int = 1
    """Most jobs of one shape that a slot trains together, unless its trainer measures another number."""

    memory_bytes: int | None = None
    """Memory for training; jobs that need more are not claimed. None claims every job."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Random for every boot, so that a restarted worker is another worker."""


def worker_started(db: Database, worker: WorkerIdentity) -> None:
    """Insert the row of this boot, and delete the rows of workers not seen for a day."""
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
            "devices": [device | {"cohort": worker.cohort} for device in worker.devices],
            "versions": worker.versions,
            "started_at": db.now,
            "last_seen_at": db.now,
            "stopped_at": None,
        }
        session.execute(sa.insert(workers).values(**values))


def worker_seen(db: Database, worker_id: str) -> None:
    """Record that this boot is alive: while it is, an expired lease is not counted as a crash."""
    workers = table(Worker)
    with db.write() as session:
        session.execute(sa.update(workers).where(workers.c.id == worker_id).values(last_seen_at=db.now))


def worker_measured(db: Database, worker_id: str, device: str, cohort: int) -> None:
    """Record how many jobs of one shape a trainer on this device has found that it should train together."""
    workers = table(Worker)
    of_worker = workers.c.id == worker_id
    with db.write() as session:
        devices = session.execute(sa.select(workers.c.devices).where(of_worker).with_for_update()).scalar_one()
        found = [one | {"cohort": cohort} if one["device"] == device else one for one in devices]
        session.execute(sa.update(workers).where(of_worker).values(devices=found))


def worker_stopped(db: Database, worker_id: str) -> None:
    """Record that this boot has ended."""
    workers = table(Worker)
    with db.write() as session:
        session.execute(sa.update(workers).where(workers.c.id == worker_id).values(stopped_at=db.now))


def is_alive(worker: Worker, now: datetime) -> bool:
    """Whether a worker was seen within the length of its own leases (several heartbeats) and has not stopped.

    A worker last seen further in the future than that was seen by a clock that has been set back since: it is not
    alive. `now`: the database's clock.
    """
    return not is_gone(worker, now) and worker.last_seen_at - now < timedelta(seconds=worker.lease_seconds)


def is_gone(worker: Worker, now: datetime) -> bool:
    """Whether a worker has stopped, or was not seen for the length of its own leases. A worker that was seen in the
    future may still be alive: it is not gone. `now`: the database's clock."""
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
