"""The audit: who changed what, and when. Entries are written in the transaction of the change, and never changed."""

import sqlalchemy as sa
from sqlmodel import Session, col, select

from service.access.tables import AuditEntry
from service.database.caller import Caller
from service.database.database import Database, caller_of
from service.database.schema import table


def record(db: Database, session: Session, action: str, object_id: str, *, by: Caller | None = None) -> None:
    """Write an entry if the session's caller, or `by`, came with a key. What a process of the service does by itself,
    and what is done where no keys are used, is not audited."""
    caller = by or caller_of(session)
    if caller.key_id is not None:
        insert_entry(db, session, action, object_id, caller)


def insert_entry(db: Database, session: Session, action: str, object_id: str, caller: Caller) -> None:
    """Write an entry, whoever the caller is."""
    values = {"at": db.now, "owner": caller.owner, "key_id": caller.key_id, "action": action, "object_id": object_id}
    session.execute(sa.insert(table(AuditEntry)).values(**values))


def list_entries(db: Database, *, owner: str | None = None, limit: int = 50) -> list[AuditEntry]:
    """The newest entries first."""
    query = select(AuditEntry).order_by(col(AuditEntry.number).desc()).limit(limit)
    if owner is not None:
        query = query.where(col(AuditEntry.owner) == owner)
    with db.read() as session:
        return list(session.exec(query))
