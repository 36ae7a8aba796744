"""Events are numbered through over all jobs, for one stream of all of them. The column that numbered those of a sweep
is renamed and filled; a sweep's row counts nothing any more, so that its jobs are written to without a common lock.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

events = sa.table(
    "events",
    sa.column("job_id", sa.String()),
    sa.column("seq", sa.BigInteger()),
    sa.column("created_at", sa.BigInteger()),
    sa.column("sweep_id", sa.String()),
    sa.column("number", sa.BigInteger()),
)


def upgrade() -> None:
    op.drop_index("ix_events_sweep", "events")
    op.execute("ALTER TABLE events RENAME COLUMN sweep_seq TO number")
    _number_the_events()
    with op.batch_alter_table("events") as batch:
        batch.alter_column("number", existing_type=sa.BigInteger(), nullable=False)
    op.create_index("ix_events_number", "events", ["number"], unique=True)
    member = sa.text("sweep_id IS NOT NULL")
    op.create_index("ix_events_sweep", "events", ["sweep_id", "number"], sqlite_where=member, postgresql_where=member)
    with op.batch_alter_table("sweeps") as batch:
        batch.drop_constraint(op.f("ck_sweeps_counts"), type_="check")
        batch.drop_column("event_seq")


def _number_the_events() -> None:
    """In the order of their times; those of a job, and of a sweep, in the order that they have, whatever the clock
    did."""
    group = sa.func.coalesce(events.c.sweep_id, events.c.job_id)
    place = sa.func.coalesce(events.c.number, events.c.seq)
    moment = sa.func.max(events.c.created_at).over(partition_by=group, order_by=place)
    timed = sa.select(events.c.job_id, events.c.seq, group.label("of"), place.label("place"), moment.label("moment"))
    timed_events = timed.subquery()
    order = (timed_events.c.moment, timed_events.c.of, timed_events.c.place)
    numbered = sa.select(
        timed_events.c.job_id, timed_events.c.seq, sa.func.row_number().over(order_by=order).label("number")
    ).subquery()
    same = (events.c.job_id == numbered.c.job_id) & (events.c.seq == numbered.c.seq)
    op.execute(sa.update(events).values(number=numbered.c.number).where(same))
    last = op.get_bind().scalars(sa.select(sa.func.coalesce(sa.func.max(events.c.number), 0))).one()
    if op.get_context().dialect.name == "sqlite":
        counters = sa.table("counters", sa.column("name", sa.String()), sa.column("value", sa.BigInteger()))
        op.execute(sa.insert(counters).values(name="events", value=last))
    else:
        op.execute(f"CREATE SEQUENCE event_numbers START WITH {last + 1}")
