"""Which queued jobs a worker may claim, and in which order, as SQL expressions."""

from datetime import datetime

import sqlalchemy as sa

from service.database.schema import table
from service.database.utc_time import UtcTime
from service.jobs.tables import Job

jobs = table(Job)

# Written out in the statement, because neither database uses a partial index for a parameter it does not know yet.
QUEUED: sa.ColumnElement[bool] = jobs.c.status == sa.literal("queued", literal_execute=True)
RUNNING: sa.ColumnElement[bool] = jobs.c.status == sa.literal("running", literal_execute=True)

CLAIM_ORDER = (jobs.c.priority.desc(), jobs.c.seq)
"""The order in which queued jobs are claimed. No clock decides it."""

WAIT_ENDS: sa.ColumnElement[datetime] = sa.type_coerce(
    sa.type_coerce(jobs.c.waits_since, sa.BigInteger) + sa.cast(jobs.c.waits_seconds * 1_000_000, sa.BigInteger),
    UtcTime(),
)
"""When a job's back-off is over; null for one without."""


def claimable(moment: sa.ColumnElement[datetime]) -> sa.ColumnElement[bool]:
    """Whether a job is queued, and waits at `moment` for nothing but a worker: neither for the date that its user gave
    nor for the end of a back-off."""
    return (
        QUEUED
        & (jobs.c.run_at.is_(None) | (jobs.c.run_at <= moment))
        # A wait that has not begun yet was written by a clock that has been set back since.
        & (jobs.c.waits_since.is_(None) | (jobs.c.waits_since > moment) | (moment >= WAIT_ENDS))
        & jobs.c.cancel_requested_at.is_(None)
    )
