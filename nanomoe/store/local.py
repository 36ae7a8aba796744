"""A folder of this machine. A new one gets its name when every byte of it is on the disk."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from nanomoe.store import commit
from nanomoe.store.store import PIECE_BYTES, Entry, Stat, Store

UNFINISHED = ".tmp"
"""Suffix of a folder's name until the folder is complete."""


class LocalStore(Store):
    """A folder of this machine."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def __truediv__(self, path: str) -> Self:
        return type(self)(self.folder / path)

    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """The content of a file."""
        return (self.folder / name).read_bytes()

    def pieces(
        self, name: str, first: int = 0, last: int | None = None, *, sha256: str | None = None
    ) -> Iterator[bytes]:
        """The bytes of a file, a piece at a time."""
        with (self.folder / name).open("rb") as file:
            file.seek(first)
            left = None if last is None else last + 1 - first
            while piece := file.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
                if left is not None:
                    left -= len(piece)
                yield piece

    def stat(self, name: str) -> Stat:
        """Size and last change of a file."""
        found = (self.folder / name).stat()
        return Stat(found.st_size, found.st_mtime)

    def exists(self) -> bool:
        """Whether the folder is there."""
        return self.folder.is_dir()

    def entries(self, depth: int) -> Iterator[Entry]:
        """What lies at most `depth` levels below; what a link points to is not ours."""
        for path in _listed(self.folder):
            if path.is_symlink():
                continue
            is_folder = path.is_dir()
            yield Entry(path.name, is_folder)
            if is_folder and depth > 1:
                for entry in (self / path.name).entries(depth - 1):
                    yield Entry(f"{path.name}/{entry.path}", entry.is_folder)

    def last_change(self) -> float:
        """When something in the first two levels was last written; 0 if it is gone."""
        newest = 0.0
        first = _listed(self.folder)
        for entry in (self.folder, *first, *(below for folder in first for below in _listed(folder))):
            try:
                newest = max(newest, entry.lstat().st_mtime)
            except FileNotFoundError:
                continue  # removed while we looked
        return newest

    def signed_url(self, name: str, seconds: float) -> str | None:
        """None: a folder has no address that others could read."""
        return None

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write the folder under another name, flush every file, and rename it.

        Raises:
            FileExistsError: the folder is there already.
            OSError: the disk is full or refuses; the folder does not exist then.
        """
        folder = self.folder
        if folder.exists():
            raise FileExistsError(f"{folder} exists already")
        unfinished = folder.with_name(folder.name + UNFINISHED)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            _write_flushed(unfinished, list(files.items()))
            commit.reached("flushed")
            unfinished.rename(folder)
            commit.reached("renamed")
            _flush_folder(folder.parent)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def put(self, name: str, content: bytes, *, create: bool = False) -> None:
        """Write one file under another name, flush it, and rename it."""
        path = self.folder / name
        if create and path.exists() and path.read_bytes() != content:
            raise FileExistsError(f"{path} exists already")
        temporary = path.with_suffix(UNFINISHED)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def check_conditions(self, name: str) -> None:
        """Nothing is to be found out."""

    def remove(self) -> None:
        """Remove the folder or file; whatever cannot be removed stays."""
        if self.folder.is_dir() and not self.folder.is_symlink():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.folder.unlink(missing_ok=True)


def _write_flushed(folder: Path, files: Sequence[tuple[str, bytes]]) -> None:
    """Write files, and return once all of them and their names are on the disk.

    They are flushed at the same time. One after the other, each waits for the file system's journal: that took three to
    nine times as long on a busy disk (measured).
    """
    with ExitStack() as opened:
        descriptors = []
        for name, content in files:
            file = opened.enter_context((folder / name).open("wb"))
            file.write(content)
            file.flush()
            descriptors.append(file.fileno())
            commit.reached(f"wrote {name}")
        descriptors.append(os.open(folder, os.O_RDONLY))
        opened.callback(os.close, descriptors[-1])
        with ThreadPoolExecutor(len(descriptors), thread_name_prefix="flush") as pool:
            for _ in pool.map(os.fsync, descriptors):
                pass


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []  # removed while we looked, or a file
