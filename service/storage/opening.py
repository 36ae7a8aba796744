"""Opening the store of files that the settings name: the data folder, or a bucket."""

from nanomoe.store import opening
from nanomoe.store.cache import CacheAddress
from nanomoe.store.opening import RETRY_SECONDS
from nanomoe.store.store import Store, StoreRefused
from service.errors import StartRefused
from service.settings import Settings

REQUEST_RETRY_SECONDS = 10.0
"""How long a bucket that is out of reach is asked again where somebody waits for the answer."""


def open_store(settings: Settings, *, retry_seconds: float = RETRY_SECONDS) -> Store:
    """The store, in which the files of each job lie at `job_folders.job_folder`. Nothing is read or written yet.

    `retry_seconds`: how long a bucket that is out of reach is asked again. Raises StartRefused when the extra that
    reaches a bucket is not installed.
    """
    location = str(settings.data_dir) if settings.store is None else settings.store
    try:
        return opening.open_store(location, cache_of(settings), retry_seconds=retry_seconds)
    except StoreRefused as error:
        raise StartRefused(str(error)) from error


def cache_of(settings: Settings) -> CacheAddress | None:
    """Where files of a bucket are kept on this machine; None where the store is a folder of it."""
    if settings.store is None:
        return None
    return CacheAddress(folder=str(settings.data_dir / "cache"), max_bytes=settings.store_cache_bytes)
