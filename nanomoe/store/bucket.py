"""A folder in a bucket that speaks S3: its files are the keys that begin with its path.

Reached through `obstore` (the extra `s3`), which reads endpoint, region and credentials from the usual AWS variables,
asks again after a failure of the store with growing pauses, and sends large files in parts.
"""

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Self, TypeVar

from nanomoe.store import commit
from nanomoe.store.cache import FileCache
from nanomoe.store.store import PIECE_BYTES, Entry, Stat, Store, StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult

log = logging.getLogger(__name__)

T = TypeVar("T")

PART_BYTES = 8 << 20
"""Size of a part of a large file; 10,000 parts, S3's most, make 80 GB."""

_AT_ONCE = 8
"""Files of a folder that are sent at the same time."""

_PARTS_AT_ONCE = 4
"""Parts of a file that are sent at the same time: all of them within SILENCE_SECONDS, on a slow line too."""

SILENCE_SECONDS = 30.0
"""How long the store may say nothing before a request counts as failed. That includes the time in which a file or a
part is sent to it (measured with obstore 0.12)."""

_MOST_PAUSE_SECONDS = 5.0
"""Longest pause between two tries."""

_PAUSE_SECONDS = 0.5
"""Pause before a request is made again that was not answered, which is noticed late enough by itself."""

_REFUSAL = re.compile(r"status code: 4(?!08|29)\d\d ")
"""An answer by which the store says that the request is at fault; neither a timeout nor too many requests."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class Bucket:
    """A bucket, and what is known about it."""

    def __init__(self, name: str, retry_seconds: float) -> None:
        """`retry_seconds`: how long a request is tried again after the store has failed."""
        try:
            from obstore.store import S3Store
        except ImportError as error:
            message = f"a store in a bucket needs the extra `s3` (pip install 'nanomoe[s3]'): {error}"
            raise StoreRefused(message) from error
        endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS)), "")
        self.name = name
        self._retry_seconds = retry_seconds
        with _translated(name):
            self.client: S3Store = S3Store(
                name,
                client_options={
                    # Whoever names such an endpoint means it.
                    "allow_http": endpoint.startswith("http://"),
                    "read_timeout": timedelta(seconds=min(SILENCE_SECONDS, max(10.0, retry_seconds))),
                    # Of the whole request, which takes as long as its bytes do.
                    "timeout": timedelta(hours=1),
                },
                retry_config={
                    "max_retries": 1000,
                    "retry_timeout": timedelta(seconds=retry_seconds),
                    "backoff": {"max_backoff": timedelta(seconds=_MOST_PAUSE_SECONDS)},
                },
            )
        self.takes_conditions = True
        """Whether the store takes `If-None-Match`, as far as is known."""

    def repeat(self, request: Callable[[], T], key: str) -> T:
        """Make a request again that has not been answered, as long as one that failed is: obstore does not where it
        changes something, because the first may have arrived. `request` must be right all the same then. `key`: what it
        is about. Raises as `_translated`."""
        give_up = time.monotonic() + self._retry_seconds
        while True:
            try:
                with _translated(key):
                    return request()
            except StoreUnavailable as error:
                if time.monotonic() + _PAUSE_SECONDS > give_up:
                    raise
                log.warning("store_asked_again: %s", error)
                time.sleep(_PAUSE_SECONDS)

    def lacks_conditions(self) -> None:
        """Say once that the store does not keep two writers of one key apart."""
        if self.takes_conditions:
            self.takes_conditions = False
            log.warning(
                "store_without_conditional_put: bucket %s does not refuse to write a file twice; the fence in each "
                "folder's name keeps writers apart",
                self.name,
            )


@functools.lru_cache
def open_bucket(name: str, retry_seconds: float) -> Bucket:
    """The bucket, once for this process. Nothing is sent yet.

    Raises:
        StoreRefused: the extra is not installed, or what the AWS variables hold is not understood.
    """
    return Bucket(name, retry_seconds)


class BucketStore(Store):
    """A folder in a bucket."""

    is_local = False

    def __init__(self, bucket: Bucket, prefix: str, cache: FileCache | None = None) -> None:
        """`prefix`: the folder's path in the bucket, empty for the bucket itself. `cache`: keeps what is read by its
        hash."""
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._cache = cache
        self.location = f"s3://{bucket.name}/{self._prefix}".rstrip("/")

    def __truediv__(self, path: str) -> Self:
        return type(self)(self._bucket, self._key(path), self._cache)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    # -- Reading --------------------------------------------------------------------------------------------------

    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """The content of a file."""
        import obstore

        cache = self._cache if sha256 is not None else None
        if cache is not None and sha256 is not None and (kept := cache.read(sha256)) is not None:
            return kept
        with _translated(self._key(name)):
            content = bytes(obstore.get(self._bucket.client, self._key(name)).bytes())
        if cache is not None and sha256 is not None:
            cache.keep(sha256, content)
        return content

    def pieces(
        self, name: str, first: int = 0, last: int | None = None, *, sha256: str | None = None
    ) -> Iterator[bytes]:
        """The bytes of a file, a piece at a time."""
        if sha256 is None or self._cache is None or first or last is not None:
            return self._received(self._get(name, first, last), name)
        if (kept := self._cache.pieces(sha256)) is not None:
            return kept
        answer = self._get(name)
        return self._cache.keeping(sha256, self._received(answer, name), answer.meta["size"])

    def _get(self, name: str, first: int = 0, last: int | None = None) -> "GetResult":
        import obstore

        options: GetOptions = {}
        if last is not None:
            options = {"range": (first, last + 1)}
        elif first:
            options = {"range": {"offset": first}}
        with _translated(self._key(name)):
            return obstore.get(self._bucket.client, self._key(name), options=options)

    def _received(self, answer: "GetResult", name: str) -> Iterator[bytes]:
        with _translated(self._key(name)):
            for piece in answer.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)

    def stat(self, name: str) -> Stat:
        """Size and last change of a file."""
        return self._stat(self._key(name))

    def _stat(self, key: str) -> Stat:
        import obstore

        with _translated(key):
            found = obstore.head(self._bucket.client, key)
        return Stat(found["size"], found["last_modified"].timestamp())

    def exists(self) -> bool:
        """Whether a file lies in the folder."""
        return next(self._listed(), None) is not None

    def entries(self, depth: int) -> Iterator[Entry]:
        """What lies at most `depth` levels below: one request for a thousand files, however deep they lie."""
        seen: set[str] = set()
        for path, _ in self._listed():
            parts = path.split("/")
            for level in range(1, min(depth, len(parts)) + 1):
                found = "/".join(parts[:level])
                if found not in seen:
                    seen.add(found)
                    yield Entry(found, is_folder=level < len(parts))

    def last_change(self) -> float:
        """When a file of the folder, or the file of this name, was last written, by the store's clock; 0 where there is
        none."""
        newest = max((changed_at for _, changed_at in self._listed()), default=None)
        if newest is not None:
            return newest
        try:
            return self._stat(self._prefix).changed_at
        except FileNotFoundError:
            return 0.0

    def signed_url(self, name: str, seconds: float) -> str | None:
        """A URL at which anybody can read the file for so many seconds."""
        import obstore

        with _translated(self._key(name)):
            return obstore.sign(self._bucket.client, "GET", self._key(name), timedelta(seconds=seconds))

    def _listed(self) -> Iterator[tuple[str, float]]:
        """The path below the folder, and the time of the last write, of every file."""
        import obstore

        n = len(self._prefix) + 1 if self._prefix else 0
        with _translated(self._prefix):
            for batch in obstore.list(self._bucket.client, self._prefix or None):
                for found in batch:
                    yield found["path"][n:], found["last_modified"].timestamp()

    # -- Writing --------------------------------------------------------------------------------------------------

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write all files but the last, several at a time; then the last, which must not exist.

        Raises:
            FileExistsError: the last file is there already, with another content.
        """
        *others, (last, content) = files.items()
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="store") as pool:
            for _ in pool.map(lambda file: self._write_one(*file), others):
                pass
        commit.reached("flushed")
        self.put(last, content, create=True)
        commit.reached("renamed")

    def _write_one(self, name: str, content: bytes) -> None:
        self.put(name, content)
        commit.reached(f"wrote {name}")

    def put(self, name: str, content: bytes, *, create: bool = False) -> None:
        """Write one file. With `create` the store refuses a second one; where it cannot, it is looked for first."""
        import obstore

        key, client = self._key(name), self._bucket.client
        if create and self._bucket.takes_conditions:
            try:
                self._bucket.repeat(lambda: obstore.put(client, key, content, mode="create"), key)
                return
            except _RequestUnknown:
                self._bucket.lacks_conditions()
            except FileExistsError:
                # An answer may have been lost, after which the request was sent again.
                if self.read(name) != content:
                    raise
                return
        if create and self._holds_another(name, content):
            raise FileExistsError(f"{self.location}/{name} exists already")
        with _translated(key):
            obstore.put(client, key, content, chunk_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    def _holds_another(self, name: str, content: bytes) -> bool:
        try:
            return self.read(name) != content
        except FileNotFoundError:
            return False

    def check_conditions(self, name: str) -> None:
        """Find out whether the store refuses to write a file that is there; say so in the log where it does not."""
        import obstore

        content = self.read(name)
        try:
            with _translated(self._key(name)):
                obstore.put(self._bucket.client, self._key(name), content, mode="create")
        except FileExistsError:
            return
        except _RequestUnknown:
            pass
        self._bucket.lacks_conditions()

    def remove(self) -> None:
        """Remove every file of the folder, up to a thousand with one request."""
        import obstore

        keys = [self._key(path) for path, _ in self._listed()] or [self._prefix]  # a file, or gone
        self._bucket.repeat(lambda: obstore.delete(self._bucket.client, keys), self._prefix)


class _RequestUnknown(Exception):
    """The store answers 501: it has no conditional writes."""


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Raise the errors of `nanomoe.store.store` in place of obstore's, `_RequestUnknown` where the store answers that
    it does not know the request. `key`: what they are about."""
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        if "<Code>NoSuchBucket</Code>" in str(error):
            raise StoreRefused(_explained(error)) from error
        raise FileNotFoundError(f"the store has no {key}") from error
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
        raise FileExistsError(f"the store has {key} already") from error
    except (
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.UnknownConfigurationKeyError,
        exceptions.InvalidPathError,
    ) as error:
        raise StoreRefused(_explained(error)) from error
    except exceptions.BaseError as error:
        message = str(error)
        if _REFUSAL.search(message):
            raise StoreRefused(_explained(error)) from error
        if "501 Not Implemented" in message or "<Code>NotImplemented</Code>" in message:
            raise _RequestUnknown(_explained(error)) from error
        raise StoreUnavailable(_explained(error)) from error


def _explained(error: BaseException) -> str:
    """What an error of obstore says, in a line: the request, and the code and message of the store's answer."""
    text = str(error)
    answer = [found[1] for name in ("Code", "Message") if (found := re.search(f"<{name}>([^<]*)</{name}>", text))]
    request = text.partition("\n")[0].partition("<?xml")[0].strip().rstrip(":")
    return ": ".join([request, *answer])
