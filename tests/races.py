"""Two transactions brought to the exact moment where they collide, by hooks on the engine instead of by sleeping."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import pytest
import sqlalchemy as sa

from service.database.database import Database

T = TypeVar("T")
TIMEOUT_SECONDS = 30.0
"""Seconds after which a test that waits is taken to hang."""


class Held(Generic[T]):
    """A call in a thread of its own that has done everything but its COMMIT."""

    def __init__(self, future: "Future[T]", go: threading.Event) -> None:
        self._future = future
        self._go = go

    def let_go(self) -> T:
        """Let it commit; its result, or the exception that it raised."""
        self._go.set()
        return self._future.result(TIMEOUT_SECONDS)


class Races:
    """Calls on one database, held and released."""

    def __init__(self, db: Database, pool: ThreadPoolExecutor) -> None:
        self._db = db
        self._pool = pool
        self._holds: dict[int, tuple[threading.Event, threading.Event]] = {}
        self._begins: dict[int, threading.Event] = {}
        sa.event.listen(db.engine, "commit", self._on_commit)
        sa.event.listen(db.engine, "before_cursor_execute", self._on_statement)

    def close(self) -> None:
        for _, go in self._holds.values():
            go.set()

    def hold(self, call: Callable[..., T], *arguments: Any, **options: Any) -> Held[T]:
        """Run `call` up to the COMMIT of its writing transaction, and return while it stands there."""
        arrived, go = threading.Event(), threading.Event()

        def run() -> T:
            self._holds[threading.get_ident()] = (arrived, go)
            return call(*arguments, **options)

        future = self._pool.submit(run)
        assert arrived.wait(TIMEOUT_SECONDS), "it never came to its commit"
        return Held(future, go)

    def start(self, call: Callable[..., T], *arguments: Any, **options: Any) -> "Future[T]":
        """Run `call` until it waits for the lock of a transaction that is held."""
        begun = threading.Event()

        def run() -> T:
            self._begins[threading.get_ident()] = begun
            return call(*arguments, **options)

        future = self._pool.submit(run)
        assert begun.wait(TIMEOUT_SECONDS), "it never began to write"
        while not (self._db.is_sqlite or future.done() or self._somebody_waits()):
            pass  # SQLite waits at BEGIN, which cannot be seen from outside; PostgreSQL lists who waits
        return future

    def _somebody_waits(self) -> bool:
        with self._db.read() as session:
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return bool(session.execute(sa.text(waiting)).scalar_one())

    def _on_commit(self, connection: sa.Connection) -> None:
        hold = self._holds.pop(threading.get_ident(), None)
        if hold is not None:
            arrived, go = hold
            arrived.set()
            assert go.wait(TIMEOUT_SECONDS)

    def _on_statement(self, connection: sa.Connection, *_: Any) -> None:
        # The first statement of a writing transaction: on SQLite it is the BEGIN IMMEDIATE that will wait.
        if connection.get_execution_options().get("writes") and threading.get_ident() in self._begins:
            self._begins.pop(threading.get_ident()).set()


@contextmanager
def races_on(db: Database) -> Iterator[Races]:
    with ThreadPoolExecutor(64) as pool:
        found = Races(db, pool)
        try:
            yield found
        finally:
            found.close()


@pytest.fixture
def races(db: Database) -> Iterator[Races]:
    with races_on(db) as found:
        yield found


def at_once(calls: list[Callable[[], T]]) -> list[T]:
    """Run the calls in threads that start together; their results in order."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        barrier.wait(TIMEOUT_SECONDS)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(TIMEOUT_SECONDS) for future in [pool.submit(run, call) for call in calls]]
