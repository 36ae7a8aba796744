"""Notification of every commit, whichever process made it, for idle workers, long polls and event streams.

SQLite: `PRAGMA data_version` on a connection of its own, every 20 ms. PostgreSQL: LISTEN. Knows no table.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

CHANNEL = "nanomoe"
POLL_SECONDS = 0.02
RETRY_SECONDS = 1.0

Source = Callable[[threading.Event], Iterator[bool]]
"""Yields whether something changed since the last time, often enough that a stop is noticed within a quarter second."""


class Changes:
    """Counts the commits that one background thread sees, which starts with the first call. Thread-safe."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._number = 0
        self._condition = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._callbacks: dict[object, Callable[[], None]] = {}

    @property
    def number(self) -> int:
        """How many changes were seen so far. Read it before the tables, then wait for another number."""
        self._watch()
        with self._condition:
            return self._number

    def wait(self, timeout: float, since: int | None = None) -> int:
        """Wait at most `timeout` seconds until `number` is not `since` (None: not what it is now); returns it."""
        self._watch()
        with self._condition:
            before = self._number if since is None else since
            self._condition.wait_for(lambda: self._number != before or self._stop.is_set(), timeout)
            return self._number

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` from the watching thread after every change; it must not block. Returns the unsubscriber."""
        self._watch()
        key = object()
        with self._condition:
            self._callbacks[key] = callback

        def unsubscribe() -> None:
            with self._condition:
                self._callbacks.pop(key, None)

        return unsubscribe

    def close(self) -> None:
        """Stop watching, and end every wait."""
        self._stop.set()
        with self._condition:
            self._condition.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        with self._condition:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="nanomoe-changes", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                for changed in self._source(self._stop):
                    if changed:
                        self._notify()
                    if self._stop.is_set():
                        return
            except Exception as error:
                # Whatever the driver raises, the database may be out of reach: log it, try again, and count the gap as
                # a change, because one may have been missed.
                log.warning("cannot watch the database for changes, trying again: %s", error)
                self._stop.wait(RETRY_SECONDS)
                self._notify()

    def _notify(self) -> None:
        with self._condition:
            self._number += 1
            self._condition.notify_all()
            callbacks = list(self._callbacks.values())
        for callback in callbacks:
            callback()


def watch_sqlite(driver: ModuleType, file: Path, stop: threading.Event) -> Iterator[bool]:
    """A Source over a SQLite file: `data_version` differs once another connection has committed."""
    with closing(
        driver.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    ) as connection:
        seen = None
        while True:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            yield version != seen
            seen = version
            stop.wait(POLL_SECONDS)


def listen_to_postgresql(connect: Callable[[], Any], stop: threading.Event) -> Iterator[bool]:
    """A Source over a connection of its own, which `connect` makes: it listens for the notification of every writing
    transaction."""
    connection = connect()
    with closing(connection):
        connection.execute(f"LISTEN {CHANNEL}")
        yield True
        while True:
            # The driver waits, and not `select`, which takes no descriptor above 1023.
            yield bool(list(connection.notifies(timeout=0.2, stop_after=1)))
