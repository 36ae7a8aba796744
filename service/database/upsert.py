"""Upserts: the ON CONFLICT insert of SQLite and PostgreSQL."""

from typing import Any

from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlmodel import Session

from service.database.schema import Row, table


def insert_or_update(session: Session, row: type[Row], values: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Insert a row, or many; where the primary key exists, replace the other columns."""
    insert = _insert(session, table(row))  # not into the mapped class: each row would pass through its mapper
    keys = [column.name for column in table(row).primary_key]
    names = values if isinstance(values, dict) else values[0]
    others = {name: insert.excluded[name] for name in names if name not in keys}
    if isinstance(values, dict):
        session.execute(insert.values(**values).on_conflict_do_update(index_elements=keys, set_=others))
    else:
        session.execute(insert.on_conflict_do_update(index_elements=keys, set_=others), values)


def insert_unless_there(session: Session, row: type[Row]) -> Any:
    """An INSERT that does nothing where a unique key exists already, in another transaction's commit too."""
    return _insert(session, row).on_conflict_do_nothing()


def _insert(session: Session, into: Any) -> Any:
    # SQLAlchemy has a class for each. Any: the two have the ON CONFLICT methods in common, but no base that names them.
    return (sqlite_insert if session.get_bind().dialect.name == "sqlite" else postgresql_insert)(into)
