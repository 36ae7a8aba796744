"""Keys, their owners, sign-ins and the audit; how long each attempt of an owner's job used a device; the bytes of each
checkpoint; and the index by which an owner's jobs are listed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_json = sa.JSON(none_as_null=True)

checkpoints = sa.table(
    "checkpoints",
    sa.column("job_id", sa.String()),
    sa.column("percent", sa.Integer()),
    sa.column("files", _json),
    sa.column("n_bytes", sa.BigInteger()),
)


def upgrade() -> None:
    _add_access()
    _add_usage()


def _add_access() -> None:
    op.create_table(
        "owners",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("quotas", _json, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_owners")),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=True),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("role IN ('admin', 'member', 'viewer')", name=op.f("ck_keys_role")),
        sa.ForeignKeyConstraint(["owner"], ["owners.name"], name=op.f("fk_keys_owner")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
    )
    op.create_index("ix_keys_sha256", "keys", ["sha256"], unique=True)
    op.create_table(
        "sign_ins",
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_sign_ins_key_id")),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_sign_ins")),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit")),
    )


def _add_usage() -> None:
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "fence", name=op.f("pk_attempts")),
    )
    op.create_index("ix_attempts_owner", "attempts", ["owner", "ended_at"])
    op.create_index("ix_jobs_owner", "jobs", ["owner", "seq"])
    op.create_index("ix_sweeps_owner", "sweeps", ["owner", "seq"])
    op.add_column("checkpoints", sa.Column("n_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_checkpoints_bytes", "checkpoints", ["job_id", "n_bytes"])
    connection = op.get_bind()
    for job_id, percent, files in connection.execute(
        sa.select(checkpoints.c.job_id, checkpoints.c.percent, checkpoints.c.files)
    ).all():
        row = sa.update(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.percent == percent)
        connection.execute(row.values(n_bytes=sum(file["size"] for file in files)))
