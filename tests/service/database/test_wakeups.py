"""Waiting on the event loop for a database that other threads and processes change."""

import asyncio
from typing import Any

import sqlalchemy as sa

from service.database.database import Database
from service.database.schema import table
from service.database.wakeups import Wakeups
from service.jobs.tables import Text
from tests.databases import EITHER

pytestmark = EITHER
TIMEOUT_SECONDS = 20


def change(db: Database) -> None:
    with db.write() as session:
        session.execute(sa.delete(table(Text)))
        session.execute(sa.insert(table(Text)).values(sha256="x", n_bytes=1, content=b"x", created_at=db.now))


def run(coroutine: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await coroutine

    asyncio.run(bounded())


def test_a_change_between_the_look_and_the_wait_is_not_missed(db: Database) -> None:
    async def scenario() -> None:
        wakeups = Wakeups(db)
        noticed = wakeups.next()
        await asyncio.to_thread(change, db)
        await wakeups.wait(noticed, 2 * TIMEOUT_SECONDS)
        assert noticed.is_set()
        wakeups.close()

    run(scenario())


def test_everybody_who_waits_is_woken(db: Database) -> None:
    async def scenario() -> None:
        wakeups = Wakeups(db)
        waiting = [asyncio.create_task(wakeups.wait(wakeups.next(), 2 * TIMEOUT_SECONDS)) for _ in range(100)]
        await asyncio.to_thread(change, db)
        await asyncio.gather(*waiting)
        wakeups.close()

    run(scenario())


def test_a_wait_ends_with_its_time(db: Database) -> None:
    async def scenario() -> None:
        wakeups = Wakeups(db)
        loop = asyncio.get_running_loop()
        # The first look at the database counts as a change.
        await wakeups.wait(wakeups.next())
        quiet, start = wakeups.next(), loop.time()
        await wakeups.wait(quiet, 0.05)
        assert loop.time() - start >= 0.05
        assert not quiet.is_set()
        wakeups.close()

    run(scenario())


def test_closing_lets_everybody_go(db: Database) -> None:
    async def scenario() -> None:
        wakeups = Wakeups(db)
        waiting = [asyncio.create_task(wakeups.wait(wakeups.next(), 2 * TIMEOUT_SECONDS)) for _ in range(3)]
        await asyncio.sleep(0)
        wakeups.close()
        await asyncio.gather(*waiting)
        await wakeups.wait(wakeups.next(), 2 * TIMEOUT_SECONDS)
        assert wakeups.closed
        wakeups.close()

    run(scenario())
