"""How the packages of loops are compiled, where the result is kept, and how threads share a loop."""

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Divisions by zero give infinity or NaN, as they do in torch. A check of each would keep loops from being vectorised.
_HOW: dict[str, Any] = {"cache": True, "error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}


class LoopPackage:
    """A package whose loops numba compiles, and the folder where it keeps what they compile to."""

    def __init__(self, package: Path, *others: Path) -> None:
        """`others`: files beside those of the package that its loops take a constant or a function from.

        The folder is one for these very sources: numba notices by itself when a loop's own file has changed, but not
        when a loop or a constant that it takes from another file has.
        """
        here = Path(__file__)
        sources = [*sorted(package.glob("*.py")), *others, here, here.with_name("float32_functions.py")]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
        beside = package / "__pycache__" if os.access(package, os.W_OK) else Path.home() / ".cache" / "nanomoe"
        self.folder = Path(os.environ.get("NUMBA_CACHE_DIR") or beside) / digest

    def _mark(self) -> Path:
        """The file that says that all loops are kept for this processor, in the form that this numba reads."""
        processor = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
        digest = hashlib.sha256(repr((numba.__version__, processor)).encode()).hexdigest()[:16]
        return self.folder / f"compiled-{digest}"

    def are_compiled(self) -> bool:
        """Whether every loop has been compiled for this processor and is kept, so that loading it compiles nothing."""
        return self._mark().exists()

    def mark_compiled(self) -> None:
        """Note that every loop has been compiled for this processor and is kept."""
        self._mark().parent.mkdir(parents=True, exist_ok=True)
        self._mark().touch()

    def compiled(self, function: F) -> F:
        """Compile a function; sums are taken in the order that it says."""
        return self._compiled(function, {"contract"})

    def compiled_in_any_order(self, function: F) -> F:
        """Compile a function; the compiler may choose the order of sums, which is what lets it use vectors. It chooses
        once, so equal rows give equal results."""
        return self._compiled(function, {"contract", "reassoc", "nsz", "arcp"})

    def _compiled(self, function: F, fastmath: set[str]) -> F:
        before = numba.config.CACHE_DIR  # type: ignore[attr-defined] # set by numba at run time
        numba.config.CACHE_DIR = str(self.folder)  # type: ignore[attr-defined] # set by numba at run time
        try:
            return cast(F, numba.njit(**_HOW, fastmath=fastmath)(function))
        finally:
            numba.config.CACHE_DIR = before  # type: ignore[attr-defined] # set by numba at run time


def compiled_for() -> str:
    """The compiler, and the processor whose instructions it chooses: with others the same loop may round otherwise."""
    return f"numba {numba.__version__}, {llvmlite.binding.get_host_cpu_name()}"


_MOST_THREADS = 1024
"""Threads that can do something together: a thread is made only when all others are busy. Assumed."""


@functools.cache
def thread_pool() -> ThreadPoolExecutor:
    """The threads that loops and products are shared among, which stay."""
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="loops")


def start_threads() -> None:
    """Start a thread of the pool for each core: a process that looks for what a job has left finds no new one."""
    n_threads = os.cpu_count() or 1
    together = threading.Barrier(n_threads)
    for each in [thread_pool().submit(together.wait) for _ in range(n_threads)]:
        each.result()


def in_parts(loop: Callable[[int, int], T], bounds: Sequence[int]) -> list[T]:
    """What a compiled loop gives for each part between two neighbouring bounds; the first is done on this thread."""
    (first, last), *others = pairwise(bounds)
    running = [thread_pool().submit(loop, *part) for part in others]
    return [loop(first, last), *(each.result() for each in running)]


def even_bounds(n: int, n_parts: int) -> list[int]:
    """The bounds of at most `n_parts` nearly equal parts of range(n), n at least 1."""
    n_parts = min(n, n_parts)
    return [n * part // n_parts for part in range(n_parts + 1)]
