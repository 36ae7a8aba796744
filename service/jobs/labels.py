"""A job's name and tags, which its user may change whatever the status."""

from collections.abc import Mapping
from typing import Any

from service.access import audit
from service.database.database import Database
from service.jobs.reads import load_job
from service.jobs.tables import Job


def relabel(db: Database, job_id: str, changes: Mapping[str, Any]) -> Job:
    """Change a job's `name`, its `tags`, or both. Raises NotFound `job_not_found`."""
    assert changes.keys() <= {"name", "tags"}
    with db.write() as session:
        job = load_job(session, job_id)
        for field, value in changes.items():
            setattr(job, field, value)
        audit.record(db, session, "job.relabel", job_id)
        return job
