"""`nanomoe keys`: who may use the service. The commands work on the database of this machine's settings, beside a
service that runs or before the first start: whoever can read its files needs no key.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from service.access.roles import ROLES
from service.cli import text
from service.cli.addresses import settings
from service.cli.commands import Command
from service.cli.database import opened_database
from service.cli.output import Json, print_json
from service.cli.usage_error import UsageError
from service.settings import Settings

if TYPE_CHECKING:
    from service.access.quotas import Quotas
    from service.database.database import Database

app = typer.Typer(name="keys", help="Make, list and revoke keys; show who changed what.", no_args_is_help=True)


@app.command(cls=Command)
def create(
    owner: Annotated[
        str, typer.Argument(metavar="OWNER", help="Name of whom the key and its jobs belong to; may have several keys.")
    ],
    role: Annotated[
        str,
        typer.Option(
            help="admin: everything; member: the owner's own jobs; viewer: reads what a member does, changes nothing."
        ),
    ] = "member",
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Set a quota of the owner, over all keys: queued_jobs, running_jobs, device_seconds_per_day or "
            "bytes_stored; may be given several times.",
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="What the key is for, in words.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, once: it is stored nowhere. From the first one on, the service asks for a key."""
    from service.access import keys

    if role not in ROLES:
        raise UsageError(f"--role {role!r} is none of {', '.join(ROLES)}")
    quotas = _parsed(quota)
    here = settings()
    defaults = _parsed(here.default_quotas)
    with _opened(here) as database:
        made = keys.create_key(database, owner, role, label=label, quotas=quotas, default_quotas=defaults)
    if as_json:
        print_json({"key": made.key, "id": made.id, "owner": made.owner, "role": made.role})
        return
    print(made.key)
    hint = f"{made.role} key {made.id} of {made.owner}: it is not shown again; clients read it from NANOMOE_KEY"
    text.console(stderr=True).print(hint, style=text.DIM, soft_wrap=True)


@app.command("list", cls=Command)
def list_(as_json: Json = False) -> None:
    """List the keys, revoked ones too; never the keys themselves."""
    from service.access import keys

    with _opened(settings()) as database:
        found = keys.list_keys(database)
    if as_json:
        fields = ("id", "owner", "role", "label", "created_at", "revoked_at")
        print_json([{name: _plain(getattr(key, name)) for name in fields} | {"quotas": q.given} for key, q in found])
        return
    if not found:
        text.console().print("no key: whoever reaches the service may use it")
        return
    table = text.new_table("id", "owner", "role", "made", "label", "quotas of the owner")
    for key, quotas in found:
        state = text.ago(key.created_at) if key.revoked_at is None else Text("revoked", text.WRONG)
        limits = ", ".join(f"{name}={value:g}" for name, value in quotas.given.items())
        table.add_row(key.id, key.owner, key.role, state, text.visible(key.label or ""), limits)
    text.print_table(table)


@app.command(cls=Command)
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as it is listed.")],
) -> None:
    """End a key for good, and the sign-ins made with it. The owner's jobs stay."""
    from service.access import keys

    with _opened(settings()) as database:
        revoked = keys.revoke_key(database, key_id)
    text.console().print(f"revoked the {revoked.role} key {revoked.id} of {revoked.owner}")


@app.command(cls=Command)
def audit(
    owner: Annotated[str | None, typer.Option(help="Only what this owner's keys changed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most entries to show.")] = 50,
    as_json: Json = False,
) -> None:
    """Show who changed what, the newest first."""
    from service.access.audit import list_entries

    with _opened(settings()) as database:
        entries = list_entries(database, owner=owner, limit=limit)
    if as_json:
        fields = ("at", "owner", "key_id", "action", "object_id")
        print_json([{name: _plain(getattr(entry, name)) for name in fields} for entry in entries])
        return
    table = text.new_table("when", "owner", "key", "what", "of")
    for entry in entries:
        who = entry.owner or "this machine"
        when = entry.at.strftime("%Y-%m-%d %H:%M:%S UTC")
        table.add_row(when, who, entry.key_id or "", entry.action, entry.object_id)
    text.print_table(table)


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


def _parsed(given: "list[str] | tuple[str, ...] | None") -> "Quotas":
    from service.access.quotas import Quotas

    try:
        return Quotas.parse(given or ())
    except ValueError as error:
        raise UsageError(f"--quota {error}") from None


@contextmanager
def _opened(here: Settings) -> "Iterator[Database]":
    """The database, made where there is none yet; its errors are usage errors."""
    from service.database import migrate
    from service.storage.installation import join_installation
    from service.storage.opening import open_store

    with opened_database(here) as database:
        if database.revision() is None:  # before the first start of the API, which may refuse to without a key
            migrate.upgrade(database)
            join_installation(database, open_store(here), create=True)
        # An earlier version's database is left to the API: one of that version may be running.
        database.check_revision()
        yield database
