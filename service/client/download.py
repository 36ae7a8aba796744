"""Writes a downloaded file of a checkpoint, and verifies it. Knows no connection: its callers feed it bytes."""

import hashlib
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Self

from service.client.errors import UnexpectedAnswer
from service.http import schemas


class Download:
    """Writes a temporary file beside the destination, and renames it once size and SHA-256 match, so that the
    destination is never incomplete. Without `finish`, the end of the `with` block removes the temporary file."""

    def __init__(self, name: str, to: Path, recorded: schemas.FileView | None) -> None:
        self.path = to / name if to.is_dir() else to
        self._recorded = recorded
        """None for a file that the checkpoint does not list, such as the list itself."""

        self._sha256 = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Self:
        self._file = NamedTemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}.", delete=False)
        return self

    def feed(self, chunk: bytes) -> None:
        """Append bytes to the file."""
        self._file.write(chunk)
        self._sha256.update(chunk)
        self._size += len(chunk)

    def finish(self) -> Path:
        """Verify the file and rename it into place; raises `UnexpectedAnswer` when its bytes are not the recorded
        ones."""
        if self._recorded is not None and (self._size, self._sha256.hexdigest()) != (
            self._recorded.size,
            self._recorded.sha256,
        ):
            raise UnexpectedAnswer(f"{self.path.name} arrived with other bytes than the checkpoint recorded")
        self._file.close()
        Path(self._file.name).replace(self.path)
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


def make_folder(path: str | Path) -> Path:
    """The folder, with those above it, made where they are missing."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recorded_file(checkpoint: schemas.CheckpointView, name: str) -> schemas.FileView | None:
    """The checkpoint's record of its file `name`; None when it lists no such file."""
    return next((file for file in checkpoint.files if file.name == name), None)


def file_names(checkpoint: schemas.CheckpointView) -> list[str]:
    """The names of all its files, each a plain name that is safe inside a folder of the caller's."""
    for file in checkpoint.files:
        if file.name in ("", ".", "..") or "/" in file.name or "\\" in file.name:
            raise UnexpectedAnswer(f"a checkpoint lists a file named {file.name!r}")
    return [file.name for file in checkpoint.files]
