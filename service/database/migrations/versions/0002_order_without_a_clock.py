"""Order without a clock: jobs are in the order of `seq`; `run_at` is only the date that a user gave; a back-off is
`waits_since` and `waits_seconds`.

Until now every job had a `run_at`: the time of its submission, or a date that was asked for, or the end of a back-off.
Which of them it is can be told: the first equals `created_at`, and only a back-off is later than the first claim.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NOW = {
    "sqlite": "CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000",
    "postgresql": "(SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint))",
}
"""The database's clock, in microseconds since 1970."""

SECOND = 1_000_000
MAX_BACKOFF_SECONDS = 900
"""A longer wait was written by a clock that was ahead."""

jobs = sa.table(
    "jobs",
    sa.column("id", sa.String()),
    sa.column("status", sa.String()),
    sa.column("seq", sa.BigInteger()),
    sa.column("run_at", sa.BigInteger()),
    sa.column("created_at", sa.BigInteger()),
    sa.column("started_at", sa.BigInteger()),
    sa.column("waits_since", sa.BigInteger()),
    sa.column("waits_seconds", sa.Float()),
)


def upgrade() -> None:
    op.drop_index("ix_jobs_claim", "jobs")
    op.drop_index("ix_jobs_status", "jobs")
    op.add_column("jobs", sa.Column("seq", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("waits_since", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("waits_seconds", sa.Float(), nullable=True))
    _number_the_jobs()
    _keep_backoffs()
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("seq", existing_type=sa.BigInteger(), nullable=False)
        batch.alter_column("run_at", existing_type=sa.BigInteger(), nullable=True)
        batch.create_check_constraint(op.f("ck_jobs_waits"), "(waits_since IS NULL) = (waits_seconds IS NULL)")
    _forget_dates_that_nobody_gave()
    queued = sa.text("status = 'queued'")
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        [sa.text("priority DESC"), "seq"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
    op.create_index("ix_jobs_status", "jobs", ["seq", "status"])


def _number_the_jobs() -> None:
    """By id, as they were listed, and claimed among equals. The next submit goes on counting."""
    numbered = sa.select(jobs.c.id, sa.func.row_number().over(order_by=jobs.c.id).label("seq")).subquery()
    op.execute(sa.update(jobs).values(seq=numbered.c.seq).where(jobs.c.id == numbered.c.id))
    counters = op.create_table(
        "counters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    newest = sa.select(sa.literal("jobs"), sa.func.coalesce(sa.func.max(jobs.c.seq), 0))
    op.execute(sa.insert(counters).from_select(["name", "value"], newest))


def _keep_backoffs() -> None:
    """A job that waits after a crash waits on."""
    now: sa.ColumnElement[int] = sa.literal_column(NOW[op.get_context().dialect.name], sa.BigInteger())
    left = jobs.c.run_at - now
    longest = MAX_BACKOFF_SECONDS * SECOND
    waits = (jobs.c.status == "queued") & (jobs.c.run_at > jobs.c.started_at) & (left > 0)
    seconds = sa.case((left > longest, longest), else_=left) / float(SECOND)
    op.execute(sa.update(jobs).values(waits_since=now, waits_seconds=seconds).where(waits))


def _forget_dates_that_nobody_gave() -> None:
    # PostgreSQL read its clock once for each of the two columns: within a second they are the same moment.
    at_once = jobs.c.run_at <= jobs.c.created_at + SECOND
    op.execute(sa.update(jobs).values(run_at=None).where((jobs.c.run_at > jobs.c.started_at) | at_once))
