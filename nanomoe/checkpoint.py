"""Write and read a checkpoint's folder, all or nothing, on a disk or in a bucket (`nanomoe.store`).

The manifest is written last, and a folder without it is not complete. It holds each file's size and sha256; whoever
knows the manifest's own sha256 (the job's row does) can tell that no byte has changed since. safetensors itself loads a
flipped bit without complaint. Nothing here is ever unpickled, and no file holds a wall-clock value: equal runs give
equal bytes.

Knows no torch until weights are read; the service lists and serves checkpoints with it.
"""

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from nanomoe.config import JobConfig, Strict
from nanomoe.errors import NanomoeError
from nanomoe.evaluation.metrics import CheckpointMetrics
from nanomoe.indented_json import indented
from nanomoe.store.opening import as_store
from nanomoe.store.store import Store, StoreError
from nanomoe.tokenizer import TOKENIZER_FILES, Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanomoe.model.gpt import GPT

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
ROUTING = "routing.safetensors"
RESUME_TENSORS = "resume.safetensors"
RESUME_STATE = "resume.json"
RESUME_UNTRAINED = "untrained.safetensors"

FOLDER_NAME = r"f(\d+)-s?\d+"
"""What `folder_name` and `snapshot_name` give; the group is the fence."""


def stopped_early_reason(metrics: CheckpointMetrics) -> str:
    """Why a training ended before its last step, in words."""
    figures = [] if metrics.perplexity is None else [f"perplexity {metrics.perplexity:,.3f}"]
    if metrics.best_val_loss is not None:
        figures.append(f"lowest val_loss {metrics.best_val_loss:,.4f} at step {metrics.best_val_step:,}")
    return ": ".join([stopped_early_at(metrics.step), *([", ".join(figures)] if figures else [])])


def stopped_early_at(step: int) -> str:
    """That a training ended before its last step, in words, for whoever does not know why."""
    return f"stopped early at step {step:,}"


class CheckpointDamaged(NanomoeError):
    """A file of the folder is missing, or its bytes are not those that were written."""

    code = "checkpoint_damaged"


class FileEntry(Strict):
    """A file of a checkpoint."""

    name: str
    """Its name in the folder."""

    size: int
    """Bytes."""

    sha256: str
    """SHA-256 of the file, hexadecimal."""


class Manifest(Strict):
    """The files of a checkpoint."""

    files: list[FileEntry]
    """Sorted by name; the manifest itself is not among them."""


def folder_name(fence: int, percent: int) -> str:
    """Name of a checkpoint's folder. The fence is the number of the claim that its writer holds: it keeps a stale one
    out of a newer one's."""
    return f"f{fence}-{percent}"


def snapshot_name(fence: int, step: int) -> str:
    """Name of the folder of a snapshot to resume from."""
    return f"f{fence}-s{step}"


def to_json(value: object) -> bytes:
    """The bytes of a JSON file: one form for one value, an entry a line, no NaN."""
    return indented(value).encode() + b"\n"


def write(folder: Store | Path, files: Mapping[str, bytes]) -> tuple[Manifest, str]:
    """Write `files` ({name: bytes}) as `folder`, which must not exist; returns the manifest and its sha256.

    Raises:
        FileExistsError: the folder is there already.
        StoreError: the bucket is out of reach, or refuses.
        OSError: the disk is full or refuses; `folder` does not exist then.
    """
    manifest = Manifest(
        files=[
            FileEntry(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in sorted(files.items())
        ]
    )
    manifest_bytes = to_json(manifest.model_dump())
    as_store(folder).write({**dict(sorted(files.items())), MANIFEST: manifest_bytes})
    return manifest, hashlib.sha256(manifest_bytes).hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, a quota, or a limit on the size of files refused to take more."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_manifest(folder: Store, manifest_sha256: str) -> Manifest:
    """The manifest, if it is the one that was recorded.

    Raises:
        CheckpointDamaged: it is missing or another.
        StoreError: it cannot be read now.
    """
    try:
        content = _read_bytes(folder, MANIFEST, manifest_sha256)
        if hashlib.sha256(content).hexdigest() != manifest_sha256:
            raise CheckpointDamaged(f"{folder.name}/{MANIFEST} is not the one that was recorded")
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointDamaged(f"{folder.name}/{MANIFEST}: {error}") from error


def read_file(folder: Store, entry: FileEntry) -> bytes:
    """The verified bytes of one file.

    Raises:
        CheckpointDamaged: it is missing, or a byte is wrong.
        StoreError: it cannot be read now.
    """
    content = _read_bytes(folder, entry.name, entry.sha256)
    _compare(folder, entry, hashlib.sha256(content).hexdigest(), len(content))
    return content


def _read_bytes(folder: Store, name: str, sha256: str | None = None) -> bytes:
    with _damaged_if_unreadable(folder, name):
        return folder.read(name, sha256=sha256)


def _compare(folder: Store, entry: FileEntry, sha256: str, n_bytes: int) -> None:
    if sha256 != entry.sha256:
        raise CheckpointDamaged(f"{folder.name}/{entry.name}: {n_bytes} bytes, not those that were written")


def verify(
    folder: Store | Path,
    manifest_sha256: str,
    *,
    meanwhile: Callable[[], None] = lambda: None,
    to_be_read: bool = False,
) -> Manifest:
    """The manifest of a folder, after every byte of every file was checked, a piece at a time. `meanwhile` is called
    after each piece, for what cannot wait until gigabytes are read. With `to_be_read` it is enough that the bytes lie
    on this machine: the files of a bucket are copied into its cache, or found there.

    Raises:
        CheckpointDamaged: naming the file.
        StoreError: a file cannot be read now.
    """
    folder = as_store(folder)
    manifest = read_manifest(folder, manifest_sha256)
    for entry in manifest.files:
        digest, n_bytes = hashlib.sha256(), 0
        for piece in _pieces(folder, entry, to_be_read=to_be_read):
            digest.update(piece)
            n_bytes += len(piece)
            meanwhile()
        _compare(folder, entry, digest.hexdigest(), n_bytes)
    return manifest


def _pieces(folder: Store, entry: FileEntry, *, to_be_read: bool = False) -> Iterator[bytes]:
    with _damaged_if_unreadable(folder, entry.name):
        yield from folder.pieces(entry.name, sha256=entry.sha256 if to_be_read else None)


@contextmanager
def _damaged_if_unreadable(folder: Store, name: str) -> Iterator[None]:
    """A file that is missing, or that the disk cannot read, is damage; a store that is out of reach is none."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise CheckpointDamaged(f"{folder.name}/{name}: {error}") from error


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint or snapshot. Each file is read once, when it is asked for, and its bytes are verified
    before anything is made of them.

    Every method raises CheckpointDamaged, naming the file, where one is missing or its bytes are not those that were
    written; StoreError where the store cannot be read now.
    """

    folder: Store
    manifest: Manifest | None
    """Size and hash of each file; None for a folder that nothing vouches for, whose files are taken as they are."""

    def read(self, name: str) -> bytes:
        """The content of a file."""
        if self.manifest is None:
            return _read_bytes(self.folder, name)
        entry = next((entry for entry in self.manifest.files if entry.name == name), None)
        if entry is None:
            raise CheckpointDamaged(f"{self.folder.name} holds no {name}")
        return read_file(self.folder, entry)

    def read_all(self) -> dict[str, bytes]:
        """The content of every file in the manifest, by name."""
        assert self.manifest is not None, "only a manifest tells which files there are"
        return {entry.name: read_file(self.folder, entry) for entry in self.manifest.files}

    def config(self) -> JobConfig:
        """The complete config that the model was trained with."""
        return JobConfig.model_validate_json(self.read(CONFIG))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return Tokenizer.of_files({name: self.read(name) for name in TOKENIZER_FILES})

    def metrics(self) -> CheckpointMetrics:
        """The metrics that were measured with the weights."""
        return CheckpointMetrics.model_validate_json(self.read(METRICS))

    def weights(self) -> dict[str, "Tensor"]:
        """Parameters and buffers by nanoGPT's names, on the CPU; the tied output layer is `transformer.wte.weight`."""
        from safetensors.torch import load

        weights: dict[str, Tensor] = load(self.read(WEIGHTS))
        return weights


def open(folder: Store | Path, manifest_sha256: str | None) -> OpenCheckpoint:  # noqa: A001 # as `tarfile.open`
    """Open a checkpoint or snapshot.

    `manifest_sha256` is that of the manifest as it was recorded, which vouches for every byte. None is for a folder of
    the user's own, a download or what `nanomoe train` wrote: its files are taken as they are.

    Raises:
        CheckpointDamaged: the manifest is missing or another.
        StoreError: it cannot be read now.
    """
    store = as_store(folder)
    return OpenCheckpoint(store, None if manifest_sha256 is None else read_manifest(store, manifest_sha256))


def load_model(opened: OpenCheckpoint, device: "torch.device | str" = "cpu") -> tuple["GPT", JobConfig, Tokenizer]:
    """The model of a checkpoint on `device`, in evaluation mode, with its config and its tokenizer.

    Raises:
        CheckpointDamaged: naming the file.
    """
    from nanomoe.model.gpt import GPT

    config, tokenizer = opened.config(), opened.tokenizer()
    model = GPT.build(config, tokenizer.vocab_size, device)
    model.load_state_dict(opened.weights())
    return model.eval(), config, tokenizer
