"""Waiting for changes of the database on the event loop: any number of requests, none with a thread or a session.

Knows no job and no HTTP.
"""

import asyncio
from collections.abc import Callable

from service.database.database import Database

LOOK_AGAIN_SECONDS = 15.0
"""How long a wait lasts at most, so that a change whose notification was lost is seen, too."""


class Wakeups:
    """Take `next()` before reading and `wait()` for it after: a change that falls between the two is not missed."""

    def __init__(self, database: Database) -> None:
        """Must be called on the event loop that the waiting happens on."""
        self._loop = asyncio.get_running_loop()
        self._next = asyncio.Event()
        self._closed = False
        self._unsubscribe: Callable[[], None] = database.changes.subscribe(self._changed)

    @property
    def closed(self) -> bool:
        """Whether the service is shutting down: waiting requests should end."""
        return self._closed

    def next(self) -> asyncio.Event:
        """The event that the next change sets."""
        return self._next

    async def wait(self, change: asyncio.Event, seconds: float = LOOK_AGAIN_SECONDS) -> None:
        """Return at `change`, after `seconds`, or at once when the service is shutting down."""
        if self._closed:
            return
        try:
            await asyncio.wait_for(change.wait(), min(seconds, LOOK_AGAIN_SECONDS))
        except TimeoutError:
            return

    def close(self) -> None:
        """End every wait, now and from now on. Harmless when repeated."""
        self._unsubscribe()
        self._closed = True
        self._wake()

    def _changed(self) -> None:
        # Called from the watching thread, which may outlive the loop by a moment.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._next.set()
        self._next = asyncio.Event()
