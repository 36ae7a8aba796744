"""The schema: its revision, and what every table has in common. Knows no table."""

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlmodel import SQLModel

REVISION = "0006"
"""The schema revision that this code is written for: the newest of `service/database/migrations`."""

alembic_version = sa.table("alembic_version", sa.column("version_num", sa.String))
"""The table in which Alembic keeps the schema's revision: one row."""


def read_revision(connection: Connection) -> str | None:
    """The schema revision that the database is at; None before the first migration."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.select(alembic_version.c.version_num)).scalar_one_or_none()


class Row(SQLModel):
    """Base class of all tables: one MetaData, whose constraints have names that a migration can refer to."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def table(row: type[Row]) -> sa.Table:
    """The SQLAlchemy table of a row class, for queries by column."""
    found = row.metadata.tables[str(row.__tablename__)]
    assert isinstance(found, sa.Table)
    return found
