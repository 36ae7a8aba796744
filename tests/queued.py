"""Jobs in a queue under test, and the worker that takes them. Its fixture is `worker`."""

from typing import Any

import pytest
import sqlalchemy as sa

from service.database.database import Database
from service.database.schema import table
from service.jobs import queue, reads, recording
from service.jobs.counters import raise_counter
from service.jobs.ids import new_id
from service.jobs.lease import Claim, only
from service.jobs.new_job import NewJob
from service.jobs.queue import Release
from service.jobs.submit import submit_job
from service.jobs.tables import Job
from service.jobs.workers import WorkerIdentity, worker_started

LEASE = 60.0
STEPS = {"step": [1, 2], "train_loss": [9.0, 8.0], "lr": [1e-4, 1e-4], "grad_norm": [1.0, 2.0]}
EXECUTION = {"device": "cpu", "micro_batch": 8}
CHECKPOINT = {"step": 0, "epoch": 0.0, "folder": "f", "manifest_sha256": "m", "files": [], "metrics": {"loss": 9.0}}


@pytest.fixture
def worker(db: Database) -> WorkerIdentity:
    found = WorkerIdentity(name="here")
    worker_started(db, found)
    return found


def submit(db: Database, text: str = "Era uma vez", **changes: Any) -> Job:
    job, created = submit_job(db, NewJob(**{"text": text, "config": {"epochs": 1}, **changes}))
    assert created
    return job


def claim(db: Database, worker: WorkerIdentity) -> Claim:
    found = queue.claim(db, worker, LEASE)
    assert found is not None
    return found


def running(db: Database, worker: WorkerIdentity, **changes: Any) -> Claim:
    job = submit(db, **changes)
    found = claim(db, worker)
    assert found.job_id == job.id
    return found


def statuses(db: Database, job_id: str) -> list[str]:
    return [event.data["status"] for event in reads.events_after(db, job_id, 0) if event.kind == "status"]


def everything(db: Database) -> dict[str, list[Any]]:
    """Every row of every table, to tell that nothing was written."""
    with db.read() as session:
        return {
            name: sorted(map(tuple, session.execute(sa.select(found)).all()), key=str)
            for name, found in Job.metadata.tables.items()
        }


def copy_job(db: Database, job: Job, times: int, **values: Any) -> None:
    jobs = table(Job)
    row = {column.name: getattr(job, column.name) for column in jobs.columns} | values
    with db.write() as session:
        last = raise_counter(session, "jobs", times)
        copies = [row | {"id": new_id(), "seq": seq} for seq in range(last - times + 1, last + 1)]
        session.execute(sa.insert(jobs), copies)


def prepare(db: Database, held: Claim) -> None:
    model = {"n_params": 1, "n_active_params": 1}
    recording.record_prepared(db, held, execution=EXECUTION, n_tokens=9, total_steps=4, model=model)


def out_of_memory(db: Database, held: Claim) -> Job:
    prepare(db, held)
    warnings = [{"code": "a"}, {"code": "b"}]
    return only(queue.release_jobs(db, [Release(held, micro_batch=4, interrupted="memory ran out", warnings=warnings)]))


def release_from_company(db: Database, held: Claim, most: int) -> Job:
    """Release a job, as memory ran out for those that were trained together: at most so many are from now on."""
    return only(queue.release_jobs(db, [Release(held, cohort_most=most, interrupted="memory ran out")]))
