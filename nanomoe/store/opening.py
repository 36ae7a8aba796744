"""Opening the folder that a location names: an absolute path, or `s3://BUCKET/PATH`."""

from pathlib import Path

from nanomoe.store.cache import CacheAddress, FileCache
from nanomoe.store.local import LocalStore
from nanomoe.store.store import Store

S3 = "s3://"
"""Prefix of the location of a folder in a bucket."""

RETRY_SECONDS = 120.0
"""How long a bucket that is out of reach, or answers with a failure, is asked again by whoever can wait. Credentials
are not renewed meanwhile, which sets the bound: five minutes at most."""


def open_store(location: str, cache: CacheAddress | None = None, *, retry_seconds: float = RETRY_SECONDS) -> Store:
    """The folder at `location`. Files of a bucket that are read by their hash are kept in `cache`.

    Raises:
        StoreRefused: the extra that reaches a bucket is not installed.
    """
    if not location.startswith(S3):
        return LocalStore(Path(location))
    from nanomoe.store.bucket import BucketStore, open_bucket

    bucket, _, prefix = location.removeprefix(S3).partition("/")
    kept = None if cache is None else FileCache(Path(cache.folder), cache.max_bytes)
    return BucketStore(open_bucket(bucket, retry_seconds), prefix, kept)


def as_store(place: Store | Path) -> Store:
    """`place` as a store: a path is a folder of this machine."""
    return LocalStore(place) if isinstance(place, Path) else place
