"""The checkpoints that the engine keeps loaded, ready to be continued from.

A thread reads them, so that a new one does not stop the continuations of others; everything else happens in the main
thread. Knows no request.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from torch import device as TorchDevice

from nanomoe import checkpoint
from nanomoe.checkpoint import CheckpointDamaged
from nanomoe.generation.engine import Engine
from nanomoe.store.store import Store, StoreError
from nanomoe.tokenizer import Tokenizer

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class LoadedCheckpoint:
    """A checkpoint, ready to be continued from."""

    folder: str
    engine: Engine
    tokenizer: Tokenizer
    lacks_loops: bool
    """Whether it was loaded before the compiled loops were ready, and has not been loaded again."""

    n_users: int = 0
    """Requests that are generated from it; it stays loaded while there are any."""


@dataclass(frozen=True)
class LoadFailure:
    """Why a checkpoint could not be loaded."""

    code: str
    """Stable and machine-readable."""

    message: str


class CheckpointCache:
    """Loads checkpoints, and drops the least recently used ones when they take more memory than they may."""

    def __init__(
        self,
        device: TorchDevice,
        open_folder: Callable[[str], Store],
        *,
        max_bytes: int,
        max_running: int,
        in_main_thread: Callable[[Callable[[], None]], None],
        on_failure: Callable[[str, LoadFailure], None],
    ) -> None:
        """`open_folder` opens the folder of a checkpoint; `max_bytes`: memory of the loaded checkpoints; `max_running`:
        continuations that each may generate at the same time; `in_main_thread` has a function called there;
        `on_failure` is given the manifest's sha256."""
        self._device = device
        self._open_folder = open_folder
        self._max_bytes = max_bytes
        self._max_running = max_running
        self._in_main_thread = in_main_thread
        self._on_failure = on_failure
        self._loaded: OrderedDict[str, LoadedCheckpoint] = OrderedDict()
        """By manifest sha256, the least recently used first."""
        self._replaced: list[LoadedCheckpoint] = []
        """Loaded again since, and still in use."""
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._is_loading = False
        self._has_loops = False

    def __contains__(self, manifest_sha256: str) -> bool:
        return manifest_sha256 in self._loaded

    def __getitem__(self, manifest_sha256: str) -> LoadedCheckpoint:
        return self._loaded[manifest_sha256]

    @property
    def manifests(self) -> list[str]:
        """The manifest sha256 of the checkpoints that are loaded, the least recently used first."""
        return list(self._loaded)

    @property
    def n_bytes(self) -> int:
        """Memory of the checkpoints that are loaded, without those that were replaced."""
        return sum(loaded.engine.n_bytes for loaded in self._loaded.values())

    @property
    def in_use(self) -> list[LoadedCheckpoint]:
        """The checkpoints that are being continued from."""
        return [loaded for loaded in [*self._loaded.values(), *self._replaced] if loaded.n_users]

    def acquire(self, manifest_sha256: str) -> LoadedCheckpoint:
        """A loaded checkpoint, which stays loaded until it is released or removed."""
        self._loaded.move_to_end(manifest_sha256)
        loaded = self._loaded[manifest_sha256]
        loaded.n_users += 1
        return loaded

    def release(self, loaded: LoadedCheckpoint) -> None:
        """End a use of a checkpoint."""
        loaded.n_users -= 1
        self._replaced = [replaced for replaced in self._replaced if replaced.n_users]
        self._evict()

    def remove(self, loaded: LoadedCheckpoint) -> None:
        """Drop a checkpoint whose engine is in an unknown state, whoever uses it."""
        self._loaded = OrderedDict((sha256, kept) for sha256, kept in self._loaded.items() if kept is not loaded)
        self._replaced = [replaced for replaced in self._replaced if replaced is not loaded]

    def load(self, folder: str, manifest_sha256: str) -> bool:
        """Start to load a checkpoint, unless another is being loaded or those in use leave no room; returns whether it
        was started."""
        in_use = sum(loaded.engine.n_bytes for loaded in self.in_use)
        if self._is_loading or in_use >= self._max_bytes:
            return False
        self._is_loading = True
        loading = self._loader.submit(self._read, folder, manifest_sha256, with_loops=self._has_loops)
        loading.add_done_callback(
            lambda done: self._in_main_thread(lambda: self._handle_loaded(manifest_sha256, done.result()))
        )
        return True

    def use_loops(self) -> None:
        """Load checkpoints with compiled loops from now on."""
        self._has_loops = True

    def replace_those_without_loops(self) -> None:
        """Start to load a checkpoint again, if there is one that was loaded before the compiled loops were ready. What
        is generated from it meanwhile is generated without them to its end."""
        if self._has_loops:
            for sha256, loaded in list(self._loaded.items()):
                if loaded.lacks_loops and self.load(loaded.folder, sha256):
                    loaded.lacks_loops = False  # if it cannot be read any more, it stays as it is

    def _read(self, folder: str, manifest_sha256: str, *, with_loops: bool) -> LoadedCheckpoint | LoadFailure:
        """Called in the loader's thread."""
        try:
            opened = checkpoint.open(self._open_folder(folder), manifest_sha256)
            tokenizer = opened.tokenizer()
            on_cpu = self._device.type == "cpu"
            engine = Engine(
                opened.weights(),
                opened.config(),
                device=self._device,
                max_running=self._max_running,
                cache_bytes=self._max_bytes // 4,
                compiled=with_loops or not on_cpu,
            )
            if tokenizer.vocab_size != engine.vocab_size:
                raise ValueError(f"{tokenizer.vocab_size} tokens for {engine.vocab_size} embeddings")
            return LoadedCheckpoint(folder, engine, tokenizer, lacks_loops=on_cpu and not with_loops)
        except CheckpointDamaged as error:
            return LoadFailure(error.code, str(error))
        except StoreError as error:
            log.error(error.code, folder=folder, reason=str(error))
            return LoadFailure(error.code, error.summary)
        except Exception as error:  # a fault of one checkpoint is the answer to its requests, and ends no others
            log.exception("checkpoint_unreadable", folder=folder)
            return LoadFailure("checkpoint_unreadable", f"{folder.rpartition('/')[2]}: {type(error).__name__}: {error}")

    def _handle_loaded(self, manifest_sha256: str, read: LoadedCheckpoint | LoadFailure) -> None:
        self._is_loading = False
        if isinstance(read, LoadFailure):
            self._on_failure(manifest_sha256, read)
            return
        before = self._loaded.get(manifest_sha256)
        if before is not None and before.n_users:
            self._replaced.append(before)
        self._loaded[manifest_sha256] = read
        self._evict()

    def _evict(self) -> None:
        """Drop the least recently used until the rest fits, but neither the newest nor those in use."""
        total = self.n_bytes
        for sha256, loaded in list(self._loaded.items())[:-1]:
            if total > self._max_bytes and not loaded.n_users:
                total -= loaded.engine.n_bytes
                del self._loaded[sha256]
