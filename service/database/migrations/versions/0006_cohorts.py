"""Cohorts: the shape of each job, by which those of one shape are claimed together, and the cohort in which it ran."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cohort_key", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("cohort_id", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("cohort_size", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("cohort_most", sa.Integer(), nullable=True))
    of_one_shape = sa.text("status = 'queued' AND cohort_key IS NOT NULL")
    op.create_index(
        "ix_jobs_cohort",
        "jobs",
        ["cohort_key", "seq"],
        sqlite_where=of_one_shape,
        postgresql_where=of_one_shape,
    )
