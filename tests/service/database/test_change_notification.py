"""Word of every commit, on both databases."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from service.database import change_notification
from service.database.change_notification import Changes
from service.database.database import Database
from service.database.opening import open_database
from service.database.utc_time import EPOCH
from service.jobs import reads
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_job
from service.jobs.tables import Installation
from service.settings import Settings
from tests.databases import ONLY_POSTGRESQL
from tests.races import TIMEOUT_SECONDS, Races


@pytest.fixture
def other(settings: Settings) -> Iterator[Database]:
    """The same database, opened by another process."""
    found = open_database(settings)
    yield found
    found.close()


def submit(db: Database) -> None:
    submit_job(db, NewJob(text="a b", config={}))


def settled(db: Database) -> int:
    """The number of changes once nothing more is on its way: what `submit` did before was seen."""
    seen = db.changes.number
    while (now := db.changes.wait(0.15, seen)) != seen:
        seen = now
    return seen


def test_a_commit_of_another_process_wakes_who_waits(db: Database, other: Database) -> None:
    seen = settled(db)
    submit(other)
    assert db.changes.wait(TIMEOUT_SECONDS, seen) > seen


def test_a_commit_of_ones_own_wakes_too(db: Database) -> None:
    seen = settled(db)
    submit(db)
    assert db.changes.wait(TIMEOUT_SECONDS, seen) > seen


def test_a_change_between_looking_and_waiting_is_not_missed(db: Database, other: Database) -> None:
    seen = settled(db)
    submit(other)
    db.changes.wait(TIMEOUT_SECONDS, seen)  # another waiter of this process was told
    assert db.changes.wait(TIMEOUT_SECONDS, seen) > seen


def test_without_a_change_the_wait_ends(db: Database) -> None:
    seen = settled(db)
    reads.count_jobs(db)
    assert db.changes.wait(0.05, seen) == seen


def test_what_is_rolled_back_wakes_nobody(db: Database, other: Database) -> None:
    seen = settled(db)
    with pytest.raises(sa.exc.IntegrityError), other.write() as session:
        session.execute(sa.insert(Installation), [{"id": "a", "created_at": EPOCH}] * 2)
    assert db.changes.wait(0.1, seen) == seen


def test_word_comes_after_the_commit_not_before(db: Database, races: Races) -> None:
    seen = settled(db)
    held = races.hold(submit, db)
    assert db.changes.wait(0.1, seen) == seen
    held.let_go()
    assert db.changes.wait(TIMEOUT_SECONDS, seen) > seen
    assert reads.count_jobs(db)["queued"] == 1


def test_a_subscriber_is_called_until_it_leaves(db: Database) -> None:
    settled(db)
    called = threading.Event()
    leave = db.changes.subscribe(called.set)
    submit(db)
    assert called.wait(TIMEOUT_SECONDS)
    leave()
    leave()
    called.clear()
    seen = settled(db)
    submit(db)
    assert db.changes.wait(TIMEOUT_SECONDS, seen) > seen
    assert not called.is_set()


def test_closing_wakes_who_waits(db: Database) -> None:
    settled(db)
    closing = threading.Timer(0.05, db.changes.close)
    closing.start()
    db.changes.wait(TIMEOUT_SECONDS)
    closing.join()
    assert db.changes.wait(TIMEOUT_SECONDS) == db.changes.number


@ONLY_POSTGRESQL
def test_a_listener_that_was_cut_off_listens_again(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_notification, "RETRY_SECONDS", 0.01)
    seen = settled(db)
    with db.read() as session:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = :name"
        assert session.scalars(sa.text(cut), {"name": db.engine.url.database}).all() == [True]
    assert db.changes.wait(TIMEOUT_SECONDS, seen) > seen  # the gap counts as a change
    seen = settled(db)
    submit(db)
    assert db.changes.wait(TIMEOUT_SECONDS, seen) > seen


def test_a_source_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_notification, "RETRY_SECONDS", 0.01)
    asked = 0

    def source(stop: threading.Event) -> Iterator[bool]:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise OSError("away")
        yield True
        stop.wait()

    watching = Changes(source)
    while watching.wait(TIMEOUT_SECONDS) < 3:
        pass
    assert asked == 3
    watching.close()


@ONLY_POSTGRESQL
def test_a_commit_stands_though_nobody_can_be_notified_of_it(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    @sa.event.listens_for(db.engine, "before_cursor_execute")
    def _break(*arguments: Any) -> None:
        if "pg_notify" in arguments[2]:
            raise sa.exc.InterfaceError(arguments[2], None, RuntimeError("the connection is closed"))

    submit(db)
    assert len(reads.list_jobs(db)) == 1
    assert "cannot notify of a change" in caplog.text
