"""Changing the name and the tags of a job."""

from typing import Any

import pytest

from service.database.database import Database
from service.errors import NotFound
from service.jobs import queue, reads
from service.jobs.labels import relabel
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.tables import Job
from tests.races import at_once


def submit(db: Database, **changes: Any) -> Job:
    return submit_job(db, NewJob(**{"text": "a b", "config": {}, **changes}))[0]


def test_a_job_is_relabelled(db: Database) -> None:
    job = submit(db, name="old", tags={"a": "b"})
    assert relabel(db, job.id, {"name": None}).name is None
    assert relabel(db, job.id, {"tags": {"c": "d"}}).tags == {"c": "d"}
    found = reads.get_job(db, job.id)
    assert (found.name, found.tags, found.status) == (None, {"c": "d"}, "queued")
    with pytest.raises(NotFound):
        relabel(db, "0" * 32, {"name": "x"})


def test_relabelling_and_the_queue_do_not_overwrite_each_other(db: Database) -> None:
    """The one writes the labels, the other the status: neither writes a whole row."""
    jobs = [submit(db) for _ in range(10)]
    calls = [lambda job=job: relabel(db, job.id, {"name": "new"}) for job in jobs]
    at_once([*calls, *(lambda job=job: queue.request_cancel(db, job.id) for job in jobs)])
    assert {(job.name, job.status) for job in reads.list_jobs(db)} == {("new", "cancelled")}
