"""Keys: made, found, listed, revoked; and the sign-ins of browsers with them. Knows no HTTP.

A key is 256 random bits. Stored is its SHA-256: with that many bits to guess no slow hash is needed, and none could be
afforded on every request. A key is found by one equality look-up of its hash in an index, the same for a key that is
wrong, revoked or was never made. The time that a look-up takes may depend on how many leading bits the hash of a guess
shares with a stored hash. That helps nobody: a guess whose hash shares n bits costs 2^n hashes to find, and the hash
tells nothing of the key, which is sent whole and never compared piece by piece.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlmodel import Session, col, select

from service.access import audit
from service.access.identity import Identity
from service.access.quotas import Quotas
from service.access.roles import Role
from service.access.tables import Key, Owner, SignIn
from service.database.caller import PROCESS
from service.database.database import Database
from service.database.schema import table
from service.database.upsert import insert_unless_there
from service.errors import Invalid, NotFound

PREFIX = "nmk_"
"""Beginning of every key, by which people and secret scanners know one."""

SIGN_IN_SECONDS = 14 * 24 * 3600
"""How long a browser stays signed in."""

MOST_SIGN_INS = 20
"""Most browsers that are signed in with one key: one more signs out the one that signed in first."""

_OWNER = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_keys = table(Key)
_owners = table(Owner)
_sign_ins = table(SignIn)
_VALID = _keys.c.revoked_at.is_(None)


@dataclass(frozen=True)
class NewKey:
    """A key that was just made."""

    key: str
    """The key itself, which is stored nowhere."""

    id: str
    owner: str
    role: Role


def create_key(
    db: Database,
    owner: str,
    role: Role,
    *,
    label: str | None = None,
    quotas: Quotas | None = None,
    default_quotas: Quotas | None = None,
) -> NewKey:
    """Make a key for an owner, who is added unless known.

    `quotas`: replace those limits of the owner, of all keys; `default_quotas`: the limits of an owner who is added.
    Raises Invalid `invalid_owner`.
    """
    if not _OWNER.fullmatch(owner):
        raise Invalid("invalid_owner", "an owner's name is 1 to 64 letters A to Z and a to z, digits, _, ., @ and -")
    made = NewKey(PREFIX + secrets.token_urlsafe(32), secrets.token_hex(6), owner, role)
    with db.write() as session:
        limits = default_quotas.given if default_quotas is not None else {}
        added = {"name": owner, "created_at": db.now, "quotas": limits}
        session.execute(insert_unless_there(session, Owner).values(**added))
        if quotas is not None and quotas.given:
            _set_quotas(session, owner, quotas.given)
        values = {"id": made.id, "owner": owner, "role": role, "label": label, "sha256": digest_of(made.key)}
        session.execute(sa.insert(_keys).values(**values, created_at=db.now))
        audit.insert_entry(db, session, "key.create", made.id, PROCESS)
    return made


def _set_quotas(session: Session, owner: str, limits: Mapping[str, float]) -> None:
    row = session.scalars(sa.select(Owner).where(_owners.c.name == owner).with_for_update()).one()
    row.quotas = {**row.quotas, **limits}


def revoke_key(db: Database, key_id: str) -> Key:
    """End a key for good, with the sign-ins that were made with it. Harmless when repeated. Raises NotFound
    `key_not_found`."""
    with db.write() as session:
        row = session.get(Key, key_id)
        if row is None:
            raise NotFound("key_not_found", f"there is no key with the id {key_id!r}")
        if row.revoked_at is None:
            session.execute(sa.update(_keys).where(_keys.c.id == key_id).values(revoked_at=db.now))
            session.execute(sa.delete(_sign_ins).where(_sign_ins.c.key_id == key_id))
            audit.insert_entry(db, session, "key.revoke", key_id, PROCESS)
        session.refresh(row)
        return row


def list_keys(db: Database) -> list[tuple[Key, Quotas]]:
    """All keys by owner and age, revoked ones too, each with the quotas of its owner."""
    query = select(Key, Owner).join(Owner, col(Key.owner) == col(Owner.name))
    with db.read() as session:
        rows = session.exec(query.order_by(col(Key.owner), col(Key.created_at), col(Key.id))).all()
    return [(key, Quotas.model_validate(owner.quotas)) for key, owner in rows]


def any_key_was_made(db: Database) -> bool:
    """Whether a key was ever made, be it revoked since: from then on none but those with a key are answered."""
    with db.read() as session:
        return bool(session.scalar(sa.select(sa.exists().where(_keys.c.id.is_not(None)))))


def digest_of(secret: str) -> str:
    """SHA-256 of a key or a session token, hexadecimal, as it is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def identify_key(db: Database, key: str) -> Identity | None:
    """Whose key this is; None for one that is wrong, unknown or revoked, which nothing tells apart."""
    query = sa.select(_keys.c.owner, _keys.c.role, _keys.c.id).where(_keys.c.sha256 == digest_of(key), _VALID)
    with db.read() as session:
        row = session.execute(query).one_or_none()
    return None if row is None else Identity(*row)


def is_valid(db: Database, key_id: str) -> bool:
    """Whether the key of that id was made and not revoked."""
    with db.read() as session:
        return bool(session.scalar(sa.select(sa.exists().where(_keys.c.id == key_id, _VALID))))


# Sign-ins


def sign_in(db: Database, key: str) -> tuple[Identity, str] | None:
    """Sign a browser in: whose key it is, and the session token for the cookie, which is stored nowhere. None for a key
    that is not valid. Of the key's sign-ins the newest `MOST_SIGN_INS` stay."""
    identity = identify_key(db, key)
    if identity is None:
        return None
    token = secrets.token_urlsafe(32)
    with db.write() as session:
        # Locked, so that of two sign-ins at once the second counts the first.
        session.execute(sa.select(_keys.c.id).where(_keys.c.id == identity.key_id).with_for_update(key_share=True))
        of_key = sa.select(_sign_ins.c.sha256).where(_sign_ins.c.key_id == identity.key_id)
        newest = of_key.order_by(_sign_ins.c.created_at.desc(), _sign_ins.c.sha256).limit(MOST_SIGN_INS - 1)
        is_over = _sign_ins.c.expires_at < db.now
        is_old = (_sign_ins.c.key_id == identity.key_id) & _sign_ins.c.sha256.not_in(newest)
        session.execute(sa.delete(_sign_ins).where(is_over | is_old))
        values = {"sha256": digest_of(token), "key_id": identity.key_id}
        times = {"created_at": db.now, "expires_at": db.after(SIGN_IN_SECONDS)}
        session.execute(sa.insert(_sign_ins).values(**values, **times))
        audit.record(db, session, "session.create", str(identity.key_id), by=identity.caller)
    return identity, token


def identify_session(db: Database, token: str) -> Identity | None:
    """Who signed in with this session token; None once that is over, or the key revoked."""
    query = (
        sa.select(_keys.c.owner, _keys.c.role, _keys.c.id)
        .join_from(_sign_ins, _keys, _sign_ins.c.key_id == _keys.c.id)
        .where(_sign_ins.c.sha256 == digest_of(token), _sign_ins.c.expires_at > db.now, _VALID)
    )
    with db.read() as session:
        row = session.execute(query).one_or_none()
    return None if row is None else Identity(*row)


def sign_out(db: Database, token: str) -> None:
    """End a sign-in. Harmless when repeated."""
    ended = sa.delete(_sign_ins).where(_sign_ins.c.sha256 == digest_of(token)).returning(_sign_ins.c.key_id)
    with db.write() as session:
        for key_id in session.scalars(ended).all():
            owner = session.scalars(sa.select(_keys.c.owner).where(_keys.c.id == key_id)).one()
            audit.record(db, session, "session.delete", key_id, by=Identity(owner, "viewer", key_id).caller)
