"""A database and its data folder carry one id."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from nanomoe.store.local import LocalStore
from service.database.database import Database
from service.database.schema import table
from service.errors import NotInstalled, StartRefused
from service.jobs.tables import Installation
from service.storage.installation import join_installation
from tests.races import at_once


def set_installation(db: Database, installation: str | None) -> None:
    with db.write() as session:
        session.execute(sa.delete(table(Installation)))
        if installation is not None:
            session.execute(sa.insert(table(Installation)).values(id=installation, created_at=db.now))


def test_a_new_database_and_a_new_folder_become_one_installation(db: Database, tmp_path: Path) -> None:
    with pytest.raises(NotInstalled):
        join_installation(db, LocalStore(tmp_path))  # a worker that is there before the API
    installation = join_installation(db, LocalStore(tmp_path), create=True)
    assert join_installation(db, LocalStore(tmp_path)) == installation
    assert join_installation(db, LocalStore(tmp_path), create=True) == installation


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(("in_database", "on_disk"), [("a", "b"), ("a", None), (None, "b")])
def test_a_database_and_a_folder_that_do_not_belong_together_are_refused(
    db: Database, tmp_path: Path, create: bool, in_database: str | None, on_disk: str | None
) -> None:
    set_installation(db, in_database)
    if on_disk is not None:
        (tmp_path / "installation").write_text(on_disk)
        (tmp_path / "jobs" / "1").mkdir(parents=True)
    with pytest.raises(StartRefused) as refused:
        join_installation(db, LocalStore(tmp_path), create=create)
    # Without an id in the database a worker cannot tell: the API may be about to write it.
    may_be_early = in_database is None and not create
    assert isinstance(refused.value, NotInstalled) == may_be_early
    assert ("do not belong together" in str(refused.value)) != may_be_early
    assert not (tmp_path / "installation").exists() or (tmp_path / "installation").read_text() == on_disk


def test_a_start_that_died_between_folder_and_database_is_finished(db: Database, tmp_path: Path) -> None:
    (tmp_path / "installation").write_text("a")
    assert join_installation(db, LocalStore(tmp_path), create=True) == "a"
    assert join_installation(db, LocalStore(tmp_path)) == "a"


def test_two_that_start_at_once_agree(db: Database, tmp_path: Path) -> None:
    joined = at_once([lambda: join_installation(db, LocalStore(tmp_path), create=True)] * 4)
    assert len(set(joined)) == 1
