"""A folder of files, on a disk or in a bucket: what both can do, and how they fail.

    OSError
    ├── FileNotFoundError        there is no such file
    ├── FileExistsError          it must not exist, and does
    └── StoreError
        ├── StoreUnavailable     store_unavailable    out of reach, overloaded, or it answers with a failure
        └── StoreRefused         store_refused        it does not let us: no such bucket, or no permission

A local folder raises the system's own errors besides (a full disk, for example). No StoreError says anything about the
files: what could not be read may be whole.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

PIECE_BYTES = 1 << 20
"""Read at once where a file is taken in pieces: milliseconds of work, however large the file."""


class StoreError(OSError):
    """The store cannot do what it was asked; another time, or with other settings, it may."""

    code: ClassVar[str]
    """Stable, machine-readable name of the error."""

    summary: ClassVar[str]
    """What users of a service are told. The error's own text names addresses, and is for the log."""


class StoreUnavailable(StoreError):
    """The store is out of reach, or answers with a failure of its own, and did so until no more was tried."""

    code = "store_unavailable"
    summary = "the store of files is out of reach"


class StoreRefused(StoreError):
    """The store does not let us: the bucket does not exist, or the credentials do not allow it."""

    code = "store_refused"
    summary = "the store of files does not let the service in"


@dataclass(frozen=True)
class Entry:
    """A folder or file below a folder."""

    path: str
    """Relative to that folder."""

    is_folder: bool


@dataclass(frozen=True)
class Stat:
    """What is known of a file without reading it."""

    size: int
    """Bytes."""

    changed_at: float
    """When it was last written, in seconds since 1970, by the disk's or the bucket's clock."""


class Store(ABC):
    """A folder, which `store / "name"` leads below.

    Every method raises StoreError, and a local folder OSError. `sha256`, where a method takes it, is that of the
    content that is wanted: a copy of it that is kept on this machine may be read in place of the file, and what comes
    from elsewhere is kept. Whoever needs to know that the file itself is right leaves it out.
    """

    is_local: ClassVar[bool]
    """Whether reading takes no network."""

    location: str
    """The folder's absolute path, or its URL: what opens it in another process (`nanomoe.store.opening`)."""

    @property
    def name(self) -> str:
        """The last part of the location."""
        return self.location.rpartition("/")[2]

    @abstractmethod
    def __truediv__(self, path: str) -> Self:
        """The folder `path`, which need not exist, below this one."""

    # -- Reading --------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """The content of a file. Raises FileNotFoundError."""

    @abstractmethod
    def pieces(
        self, name: str, first: int = 0, last: int | None = None, *, sha256: str | None = None
    ) -> Iterator[bytes]:
        """The bytes `first` to `last`, both included, of a file, a piece at a time; to its end without `last`. `first`
        lies inside of the file, unless it is 0. Raises FileNotFoundError."""

    @abstractmethod
    def stat(self, name: str) -> Stat:
        """Size and last change of a file. Raises FileNotFoundError."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether the folder is there; one of a bucket is where a file lies in it."""

    @abstractmethod
    def entries(self, depth: int) -> Iterator[Entry]:
        """What lies at most `depth` levels below, each once, in any order. Links are left out."""

    @abstractmethod
    def last_change(self) -> float:
        """When something in the folder (or in the file of this name) was last written, in seconds since 1970: on a
        disk in its first two levels. 0 where there is nothing."""

    @abstractmethod
    def signed_url(self, name: str, seconds: float) -> str | None:
        """A URL at which anybody can read the file for so many seconds; None where the store has none to give."""

    # -- Writing --------------------------------------------------------------------------------------------------

    @abstractmethod
    def write(self, files: Mapping[str, bytes]) -> None:
        """Write the folder, which must not exist, durably: all files or none. Where the store cannot do that, the last
        file is written last, once all others are there: a folder without it is not complete.

        Raises:
            FileExistsError: the folder, or its last file, is there already.
        """

    @abstractmethod
    def put(self, name: str, content: bytes, *, create: bool = False) -> None:
        """Write one file durably, in place of an earlier one.

        Raises:
            FileExistsError: with `create`: the file is there already, with another content.
        """

    @abstractmethod
    def check_conditions(self, name: str) -> None:
        """Find out whether the store keeps two writers of one file apart, by writing one that is there as it is; say so
        in the log where it does not. On a disk it always does."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the folder (or the file of this name), with all that lies in it. What is gone already is no error."""
