"""`nanomoe keys`, on real databases."""

from pathlib import Path
from typing import Any

import pytest

from nanomoe.store.local import LocalStore
from service.access.keys import any_key_was_made, identify_key
from service.access.tables import Key
from service.cli import main  # noqa: F401 - the command that is run
from service.client import Client, Forbidden
from service.database.database import Database
from service.database.opening import open_database
from service.settings import Settings
from service.storage.installation import join_installation
from tests.api import Serve
from tests.databases import EITHER, ONLY_SQLITE
from tests.service.cli.conftest import Run


@pytest.fixture
def at(nanomoe: Run, db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    join_installation(db, LocalStore(settings.data_dir), create=True)
    monkeypatch.setenv("NANOMOE_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("NANOMOE_DATABASE_URL", settings.database_url)
    return nanomoe


@EITHER
def test_a_key_is_made_listed_and_revoked_and_shown_once(at: Run, db: Database) -> None:
    assert at("keys", "list").out == "no key: whoever reaches the service may use it\n"
    done = at("keys", "create", "ana", "--label", "laptop", "--quota", "queued_jobs=10")
    key = done.out.strip()
    assert "it is not shown again" in done.err
    identity = identify_key(db, key)
    assert identity is not None
    assert (identity.owner, identity.role) == ("ana", "member")
    (listed,) = at("keys", "list", "--json").json
    assert (listed["id"], listed["label"], listed["quotas"]) == (identity.key_id, "laptop", {"queued_jobs": 10})
    shown = at("keys", "list").out
    assert "queued_jobs=10" in shown
    assert key not in shown
    assert at("keys", "revoke", listed["id"]).code == 0
    assert identify_key(db, key) is None
    assert any_key_was_made(db)
    assert "revoked" in at("keys", "list").out
    with db.read() as session:
        row = session.get(Key, listed["id"])
        assert row is not None
        assert key not in str(row)
    entries = at("keys", "audit", "--json").json
    assert [(one["action"], one["object_id"], one["owner"]) for one in entries] == [
        ("key.revoke", listed["id"], ""),
        ("key.create", listed["id"], ""),
    ]
    assert "this machine" in at("keys", "audit").out


@ONLY_SQLITE
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "a b"), "invalid_owner"),
        (("create", "ana", "--role", "root"), "admin, member, viewer"),
        (("create", "ana", "--quota", "jobs=1"), "queued_jobs"),
        (("create", "ana", "--quota", "queued_jobs=-1"), "queued_jobs"),
        (("revoke", "nope"), "key_not_found"),
    ],
)
def test_what_is_wrong_is_a_usage_error_and_changes_nothing(
    at: Run, db: Database, arguments: tuple[str, ...], message: str
) -> None:
    done = at("keys", *arguments)
    assert done.code == 2
    assert message in done.err
    assert not any_key_was_made(db)


def test_the_first_key_can_be_made_before_the_first_start(
    nanomoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOMOE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("NANOMOE_DEFAULT_QUOTAS", "running_jobs=2, bytes_stored=1000")
    key = nanomoe("keys", "create", "root", "--role", "admin").out.strip()
    (listed,) = nanomoe("keys", "list", "--json").json
    assert listed["quotas"] == {"running_jobs": 2, "bytes_stored": 1000}
    database = open_database(Settings(_env_file=None, data_dir=tmp_path / "data"))
    assert identify_key(database, key) is not None
    database.close()


def test_clients_and_commands_take_the_key_from_the_environment(
    nanomoe: Run, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = serve()
    monkeypatch.setenv("NANOMOE_DATA_DIR", str(api.context.settings.data_dir))
    key = nanomoe("keys", "create", "ana").out.split()[-1]  # after the log of the API in this process
    url = ("--url", api.url)
    assert "commands read the key from NANOMOE_KEY" in nanomoe("jobs", *url).err
    with Client(api.url) as nobody, pytest.raises(Forbidden) as refused:
        nobody.list_jobs()
    assert (refused.value.status, refused.value.code) == (401, "key_required")
    with Client(api.url, key=key) as client:
        assert client.session().owner == "ana"
    monkeypatch.setenv("NANOMOE_KEY", f"{key}\n")
    assert nanomoe("jobs", *url).code == 0
    with Client(api.url) as client:
        assert client.session().role == "member"
    monkeypatch.setenv("NANOMOE_KEY", "not a key")
    done: Any = nanomoe("jobs", *url)
    assert done.code == 2
    assert "not a key" not in done.err
