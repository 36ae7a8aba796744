"""The dependencies of the routes and the background tasks of the API, opened and closed together. Knows no route."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass

import structlog
from anyio import CapacityLimiter, to_thread

from nanomoe.store.store import Store, StoreError
from service.database import migrate
from service.database.database import Database
from service.database.opening import open_database
from service.database.wakeups import Wakeups
from service.errors import ServiceError, store_out_of_reach
from service.generation.admission import Generation
from service.http.authentication import Authenticator
from service.http.guard import check_address
from service.http.instruments import expose
from service.jobs.rescuer import Rescuer
from service.jobs.workers import has_training
from service.settings import Settings
from service.storage.installation import join_installation
from service.storage.opening import REQUEST_RETRY_SECONDS, cache_of, open_store

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Context:
    """Dependencies of the routes."""

    settings: Settings
    database: Database
    store: Store
    wakeups: Wakeups
    generation: Generation
    authenticator: Authenticator
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
        Unavailable: the store of files is.
    """
    store = open_store(settings, retry_seconds=REQUEST_RETRY_SECONDS)
    database = await to_thread.run_sync(_open, settings, store)
    with closing(database):
        wakeups = Wakeups(database)
        authenticator = Authenticator(database)
        check_address(settings, has_keys=await authenticator.keys_are_required())
        generation = Generation(settings, cache_of(settings))
        expose(generation.instruments, database)
        rescuer = Rescuer(database, settings.rescue_seconds)
        background = [asyncio.create_task(_rescue_periodically(rescuer, settings.rescue_seconds))]
        if settings.engine_preload:
            background.append(asyncio.create_task(_preload_engine(database, wakeups, generation)))
        try:
            limits = CapacityLimiter(1), CapacityLimiter(1)
            yield Context(settings, database, store, wakeups, generation, authenticator, *limits)
        finally:
            wakeups.close()
            for task in background:
                task.cancel()
            await asyncio.wait(background)  # even if one failed, the engine is stopped
            await generation.stop()


def _open(settings: Settings, store: Store) -> Database:
    database = open_database(settings)
    try:
        log.info("database_opened", kind=database.engine.dialect.name, revision=database.revision())
        migrate.upgrade(database)
        join_installation(database, store, create=True)
    except StoreError as error:
        database.close()
        log.error(error.code, store=store.location, reason=str(error))
        raise store_out_of_reach(error.code) from error
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
