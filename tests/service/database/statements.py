"""What tests of the database write and read."""

from typing import Any

import sqlalchemy as sa

from service.database.database import Database
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.tables import Job, Text


def submit(db: Database, text: str = "a b") -> Job:
    """A queued job."""
    return submit_job(db, NewJob(text=text, config={}))[0]


def enter_text(db: Database) -> sa.Insert:
    """Inserts the text `a`."""
    return sa.insert(Text).values(sha256="a", n_bytes=1, content=b"a", created_at=db.now)


def pragma(db: Database, name: str) -> Any:
    """The value of a setting of SQLite."""
    with db.read() as session:
        return session.execute(sa.text(f"PRAGMA {name}")).scalar_one()
