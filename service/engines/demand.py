"""How many workers the queue wants: arithmetic, and the two counts that it needs."""

import math
import re
from dataclasses import dataclass

import sqlalchemy as sa

from service.database.database import Database
from service.database.schema import table
from service.engines.fleet import Fleet
from service.jobs.claim_order import RUNNING, claimable, jobs
from service.jobs.tables import Worker


@dataclass(frozen=True)
class Demand:
    """Jobs that need a worker of a fleet."""

    waiting: int
    """Jobs that wait for nothing but a worker."""

    running: int
    """Jobs that workers of the fleet run."""


def workers_wanted(demand: Demand, fleet: Fleet) -> int:
    """How many workers the fleet should have, if it is not to end any: those above it end by themselves when idle.

    As many as there would be trainers for all jobs at once; jobs that other workers run count for none of them.
    """
    needed = math.ceil((demand.waiting + demand.running) / fleet.jobs_per_worker)
    return min(fleet.most, max(fleet.least, needed))


def read_demand(db: Database, fleet: Fleet) -> Demand:
    """The demand now. Jobs that no worker of the fleet has had the memory for are not counted, once one was seen: a
    worker that was started for them would end idle again, and again. Raises DatabaseUnavailable."""
    workers = table(Worker)
    own_name = re.compile(rf"{re.escape(fleet.name)}-\d+")
    with db.read() as session:
        rows = session.execute(sa.select(workers.c.id, workers.c.name, workers.c.devices)).all()
        own = {row.id: row.devices for row in rows if own_name.fullmatch(row.name)}
        memory = max((min(one["memory_bytes"] for one in devices) for devices in own.values() if devices), default=None)
        waits = claimable(db.now)
        if memory is not None:
            waits &= jobs.c.training_bytes.is_(None) | (jobs.c.training_bytes <= memory)
        waiting = session.scalars(sa.select(sa.func.count()).select_from(jobs).where(waits)).one()
        held = session.scalars(sa.select(jobs.c.worker_id).where(RUNNING)).all()
    return Demand(waiting, sum(worker_id in own for worker_id in held))
