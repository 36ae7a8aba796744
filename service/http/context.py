"""The dependencies of the routes and the background tasks of the API, opened and closed together. Knows no route."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass

import structlog
from anyio import CapacityLimiter, to_thread

from service.database import migrate
from service.database.database import Database
from service.database.opening import open_database
from service.database.wakeups import Wakeups
from service.errors import ServiceError
from service.generation.admission import Generation
from service.http.instruments import expose
from service.jobs.rescuer import Rescuer
from service.jobs.workers import has_training
from service.settings import Settings
from service.storage.installation import join_installation

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Context:
    """Dependencies of the routes."""

    settings: Settings
    database: Database
    wakeups: Wakeups
    generation: Generation
    comparing: CapacityLimiter
    """Limit of one search for copied spans at a time: each takes memory and a core."""

    importing: CapacityLimiter
    """Limit of one import at a time: each is a process that loads torch and a whole model."""


@asynccontextmanager
async def open_context(settings: Settings) -> AsyncIterator[Context]:
    """Migrate the database to this code's schema, and run the background tasks of the API.

    Raises:
        StartRefused: starting would risk data.
        DatabaseUnavailable: the database is out of reach.
    """
    database = await to_thread.run_sync(_open, settings)
    with closing(database):
        wakeups = Wakeups(database)
        generation = Generation(settings)
        expose(generation.instruments, database)
        rescuer = Rescuer(database, settings.rescue_seconds)
        background = [asyncio.create_task(_rescue_periodically(rescuer, settings.rescue_seconds))]
        if settings.engine_preload:
            background.append(asyncio.create_task(_preload_engine(database, wakeups, generation)))
        try:
            yield Context(settings, database, wakeups, generation, CapacityLimiter(1), CapacityLimiter(1))
        finally:
            wakeups.close()
            for task in background:
                task.cancel()
            await asyncio.wait(background)  # even if one failed, the engine is stopped
            await generation.stop()


def _open(settings: Settings) -> Database:
    database = open_database(settings)
    try:
        log.info("database_opened", kind=database.engine.dialect.name, revision=database.revision())
        migrate.upgrade(database)
        join_installation(database, settings.data_dir, create=True)
    except BaseException:
        database.close()
        raise
    return database


async def _rescue_periodically(rescuer: Rescuer, seconds: float) -> None:
    """Rescue jobs whose worker is gone, even when no other worker runs."""
    while True:
        try:
            await to_thread.run_sync(rescuer.round)
        except ServiceError as error:
            log.warning("rescue_postponed", reason=error.detail)
        except Exception:  # without the log, jobs would silently not be rescued any more
            log.exception("rescue_failed")
        await asyncio.sleep(seconds)


async def _preload_engine(database: Database, wakeups: Wakeups, generation: Generation) -> None:
    """Start the generation engine once a worker runs or a job waits: before there is a checkpoint to generate from, and
    not for an API that only serves finished jobs."""
    while not wakeups.closed:
        change = wakeups.next()
        try:
            if await to_thread.run_sync(has_training, database):
                return await generation.preload()
        except ServiceError as error:
            log.warning("generation_engine_not_preloaded", reason=error.detail)
        except Exception:  # the first request retries, and reports the error
            log.exception("generation_engine_not_preloaded")
            return None
        await wakeups.wait(change)
    return None
