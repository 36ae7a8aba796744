"""The tables of access: owners, keys, sign-ins, the audit. Neither a key nor a session token is in them, only their
SHA-256."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Column, ForeignKey, Index, Integer
from sqlmodel import AutoString, Field

from service.access.roles import ROLES, Role
from service.database.schema import Row
from service.database.utc_time import UtcTime

_COUNTED = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers the rows of a table whose primary key is an INTEGER, and of no other type."""


class Owner(Row, table=True):
    """Somebody to whom jobs belong, with one key or several."""

    __tablename__ = "owners"

    name: str = Field(primary_key=True)
    created_at: datetime = Field(sa_type=UtcTime)
    quotas: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON(none_as_null=True), nullable=False))
    """The limits that were set, by name (`service.access.quotas.Quotas`)."""


class Key(Row, table=True):
    """A key. Its row is kept once it is revoked: a service for which a key was made is never open again."""

    __tablename__ = "keys"
    __table_args__ = (
        CheckConstraint(f"role IN ({', '.join(repr(role) for role in ROLES)})", name="role"),
        Index("ix_keys_sha256", "sha256", unique=True),
    )

    id: str = Field(primary_key=True)
    """Public: it is shown in lists and in the audit, and is no part of the key."""

    owner: str = Field(foreign_key="owners.name")
    role: Role = Field(sa_type=AutoString)
    label: str | None = None
    """What the key is for, in words."""

    sha256: str
    """SHA-256 of the key, hexadecimal."""

    created_at: datetime = Field(sa_type=UtcTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcTime)


class SignIn(Row, table=True):
    """A browser that was signed in with a key, until it signs out, the time is over or the key is revoked."""

    __tablename__ = "sign_ins"

    sha256: str = Field(primary_key=True)
    """SHA-256 of the session token in the cookie, hexadecimal."""

    key_id: str = Field(sa_column=Column(ForeignKey("keys.id"), nullable=False))
    created_at: datetime = Field(sa_type=UtcTime)
    expires_at: datetime = Field(sa_type=UtcTime)


class AuditEntry(Row, table=True):
    """A change that somebody made, written in the transaction of the change."""

    __tablename__ = "audit"

    number: int | None = Field(default=None, sa_column=Column(_COUNTED, primary_key=True))
    """Given by the database, in the order in which entries are written."""

    at: datetime = Field(sa_type=UtcTime)
    owner: str
    """Owner of the key; empty for a command on the service's own machine."""

    key_id: str | None = None
    """No foreign key: an entry says what was, whatever becomes of the row."""

    action: str
    """What was done, such as `job.cancel`."""

    object_id: str
    """Id of the job, sweep or key."""
