"""Sweeps: jobs that are submitted and compared together, with their events numbered through; and what comparing many
jobs reads; the index by which jobs are found by name. Reconstructions and routers' figures move from a checkpoint's
metrics to columns of their own, and each job gets the envelope of its training loss.
"""

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

MAX_BUCKETS = 100
LARGE = ("reconstruction", "moe")

_json = sa.JSON(none_as_null=True)

checkpoints = sa.table(
    "checkpoints",
    sa.column("job_id", sa.String()),
    sa.column("percent", sa.Integer()),
    sa.column("metrics", _json),
    *(sa.column(name, _json) for name in LARGE),
)
steps = sa.table(
    "steps",
    sa.column("job_id", sa.String()),
    sa.column("step", sa.BigInteger()),
    sa.column("train_loss", sa.Float()),
)


def upgrade() -> None:
    _add_sweeps()
    _move_what_is_large()
    _make_envelopes()


def _add_sweeps() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("tags", _json, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("config", _json, nullable=False),
        sa.Column("parameters", _json, nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("request_sha256", sa.String(), nullable=True),
        sa.Column("event_seq", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("event_seq >= 0", name=op.f("ck_sweeps_counts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    op.create_index("ix_sweeps_seq", "sweeps", ["seq"])
    given = sa.text("idempotency_key IS NOT NULL")
    op.create_index(
        "ix_sweeps_idempotency",
        "sweeps",
        ["owner", "idempotency_key"],
        unique=True,
        sqlite_where=given,
        postgresql_where=given,
    )
    queued = sa.text("status = 'queued'")
    op.drop_index("ix_jobs_claim", "jobs")  # SQLite rebuilds the table, and cannot read back an index with DESC
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(sa.Column("sweep_id", sa.String(), nullable=True))
        batch.create_foreign_key(op.f("fk_jobs_sweep_id"), "sweeps", ["sweep_id"], ["id"])
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        [sa.text("priority DESC"), "seq"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
    member = sa.text("sweep_id IS NOT NULL")
    named = sa.text("name IS NOT NULL")
    op.create_index("ix_jobs_name", "jobs", ["name"], sqlite_where=named, postgresql_where=named)
    op.create_index("ix_jobs_sweep", "jobs", ["sweep_id", "seq"], sqlite_where=member, postgresql_where=member)
    op.add_column("events", sa.Column("sweep_id", sa.String(), nullable=True))
    op.add_column("events", sa.Column("sweep_seq", sa.BigInteger(), nullable=True))
    numbered = ["sweep_id", "sweep_seq"]
    op.create_index("ix_events_sweep", "events", numbered, unique=True, sqlite_where=member, postgresql_where=member)


def _move_what_is_large() -> None:
    for name in LARGE:
        op.add_column("checkpoints", sa.Column(name, _json, nullable=True))
    connection = op.get_bind()
    for job_id in connection.scalars(sa.select(checkpoints.c.job_id).distinct()).all():
        of_job = checkpoints.c.job_id == job_id
        for percent, metrics in connection.execute(
            sa.select(checkpoints.c.percent, checkpoints.c.metrics).where(of_job)
        ).all():
            large = {name: metrics.pop(name, None) for name in LARGE}
            row = sa.update(checkpoints).where(of_job, checkpoints.c.percent == percent)
            connection.execute(row.values(metrics=metrics, **large))


def _make_envelopes() -> None:
    made = op.create_table(
        "envelopes",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("width", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("train_loss", _json, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_envelopes_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_envelopes")),
    )
    connection = op.get_bind()
    for job_id in connection.scalars(sa.text("SELECT id FROM jobs")).all():
        last = connection.scalar(sa.select(sa.func.max(steps.c.step)).where(steps.c.job_id == job_id))
        if last is not None:
            width = 1
            while last > MAX_BUCKETS * width:
                width *= 2
            lows, highs = zip(*_buckets(connection, job_id, last, width), strict=True)
            values = {"job_id": job_id, "width": width, "last_step": last, "train_loss": [list(lows), list(highs)]}
            connection.execute(sa.insert(made).values(**values))


def _buckets(connection: sa.Connection, job_id: str, last: int, width: int) -> Iterator[tuple[Any, Any]]:
    """Minimum and maximum of each bucket; None for one without a figure."""
    bucket = sa.literal_column(f"(step - 1) / {width}", sa.BigInteger())
    query = sa.select(bucket, sa.func.min(steps.c.train_loss), sa.func.max(steps.c.train_loss))
    found = {row[0]: row[1:] for row in connection.execute(query.where(steps.c.job_id == job_id).group_by(bucket))}
    for number in range((last - 1) // width + 1):
        low, high = found.get(number, (None, None))
        yield _rounded(low), _rounded(high)


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else json.loads(f"{figure:.5g}")
