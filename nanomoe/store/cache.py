"""Copies of a bucket's files on this machine, by their SHA-256, within a budget of bytes.

Several processes share one: a file gets its name when it is complete, every byte is compared with the name whenever it
is read, and a file may be removed while another process reads it. Who reads next is the least likely to be removed.
A cache that cannot be written to is no cache, and no error.
"""

import hashlib
import io
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nanomoe.config import Strict
from nanomoe.store.store import PIECE_BYTES

log = logging.getLogger(__name__)

_UNFINISHED = ".tmp"
_ABANDONED_SECONDS = 3600.0
"""After which an incomplete file that nobody has written to is what a killed process left."""


class CacheAddress(Strict):
    """Where the copies lie, and how many bytes they may take."""

    folder: str
    """Absolute path."""

    max_bytes: int
    """Budget of all copies together; 0 keeps none."""


class FileCache:
    """The copies in a folder."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def read(self, sha256: str) -> bytes | None:
        """The content with this hash, every byte compared; None where there is no copy."""
        path = self._folder / sha256
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("store_cache_unreadable: %s", error)
            return None
        if hashlib.sha256(content).hexdigest() != sha256:
            self._remove_damaged(path)
            return None
        self._used(path)
        return content

    def pieces(self, sha256: str) -> Iterator[bytes] | None:
        """The content with this hash, every byte compared before the first is given; None where there is no copy."""
        path = self._folder / sha256
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("store_cache_unreadable: %s", error)
            return None
        if found != sha256:
            self._remove_damaged(path)
            return None
        self._used(path)
        try:
            file = path.open("rb")
        except OSError:
            return None  # another process has removed it
        return _pieces_of(file)

    def keep(self, sha256: str, content: bytes) -> None:
        """Keep `content`, if this is its hash and there is room."""
        for _ in self.keeping(sha256, iter([content]), len(content)):
            pass

    def keeping(self, sha256: str, pieces: Iterator[bytes], n_bytes: int) -> Iterator[bytes]:
        """The `pieces`, `n_bytes` in all, which are kept if they end and this is their hash."""
        if n_bytes > self._max_bytes:
            yield from pieces
            return
        unfinished = self._folder / f"{sha256}.{uuid.uuid4().hex}{_UNFINISHED}"
        file, digest = None, hashlib.sha256()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(n_bytes)
            file = unfinished.open("wb")
        except OSError as error:
            log.warning("store_cache_not_written: %s", error)
        try:
            for piece in pieces:
                digest.update(piece)
                if file is not None:
                    try:
                        file.write(piece)
                    except OSError as error:  # the disk is full, for example
                        log.warning("store_cache_not_written: %s", error)
                        _close(file)
                        file = None
                yield piece
            if file is not None and digest.hexdigest() == sha256:
                try:
                    file.close()  # not flushed to the disk: whoever reads it compares every byte
                    unfinished.replace(self._folder / sha256)
                except OSError as error:
                    log.warning("store_cache_not_written: %s", error)
        finally:
            _close(file)
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _make_room(self, n_bytes: int) -> None:
        """Remove the least recently used copies until `n_bytes` more are within the budget."""
        found, total = [], n_bytes
        for entry in os.scandir(self._folder):
            with suppress(OSError):  # another process has removed it
                state = entry.stat(follow_symlinks=False)
                if entry.name.endswith(_UNFINISHED) and time.time() - state.st_mtime > _ABANDONED_SECONDS:
                    Path(entry).unlink(missing_ok=True)
                    continue
                total += state.st_size
                if not entry.name.endswith(_UNFINISHED):
                    found.append((state.st_mtime, state.st_size, Path(entry)))
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    @staticmethod
    def _used(path: Path) -> None:
        with suppress(OSError):  # another process has removed it
            os.utime(path)

    @staticmethod
    def _remove_damaged(path: Path) -> None:
        log.warning("store_cache_damaged: %s is read from the store again", path.name)
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _pieces_of(file: io.BufferedReader) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _close(file: io.BufferedWriter | None) -> None:
    if file is not None:
        with suppress(OSError):
            file.close()
