"""How loops are compiled, where the result is kept, and how threads share them."""

import functools
import hashlib
import os
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

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_HERE = Path(__file__).parent


def _kept_in() -> Path:
    """A folder for what these very sources compile to. numba notices by itself when a loop's own file has changed, but
    not when a loop or a constant that it takes from another file has."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))).hexdigest()[:16]
    beside = _HERE / "__pycache__" if os.access(_HERE, os.W_OK) else Path.home() / ".cache" / "nanomoe"
    return Path(os.environ.get("NUMBA_CACHE_DIR") or beside) / digest


numba.config.CACHE_DIR = str(_kept_in())  # type: ignore[attr-defined] # set by numba at run time


def _mark() -> Path:
    """The file that says that all loops are kept for this processor, in the form that this numba reads."""
    processor = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
    digest = hashlib.sha256(repr((numba.__version__, processor)).encode()).hexdigest()[:16]
    return Path(numba.config.CACHE_DIR) / f"compiled-{digest}"  # type: ignore[attr-defined] # set by numba at run time


def are_compiled() -> bool:
    """Whether every loop has been compiled for this processor and is kept, so that loading it compiles nothing."""
    return _mark().exists()


def mark_compiled() -> None:
    """Note that every loop has been compiled for this processor and is kept."""
    _mark().parent.mkdir(parents=True, exist_ok=True)
    _mark().touch()


def _has(feature: str) -> bool:
    """Whether compiled loops may use an instruction set of this processor."""
    forced: str | None = numba.config.CPU_FEATURES  # type: ignore[attr-defined] # set by numba at run time
    if forced is not None:
        return f"+{feature}" in forced.split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))


HAS_WIDE_VECTORS = _has("avx512f")
"""Whether a vector of 16 float32 is one register."""

HAS_INT8_PRODUCTS = _has("avx512vnni")
"""Whether there is `vpdpbusd`, which multiplies and adds 64 pairs of 8-bit integers."""

# Divisions by zero give infinity or NaN, as they do in torch. A check of each would keep loops from being vectorised.
_HOW: dict[str, Any] = {"cache": True, "error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}


def compiled(function: F) -> F:
    """Compile a function; sums are taken in the order that it says."""
    return cast(F, numba.njit(**_HOW, fastmath={"contract"})(function))


def compiled_in_any_order(function: F) -> F:
    """Compile a function of a single row; the compiler may choose the order of sums, which is what lets it use vectors.
    It chooses once, so a row's result is always the same."""
    return cast(F, numba.njit(**_HOW, fastmath={"contract", "reassoc", "nsz", "arcp"})(function))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="loops")


def in_parts(loop: Callable[[int, int], object], bounds: Sequence[int]) -> None:
    """Call a compiled loop for each part between two neighbouring bounds, the first on this thread."""
    (first, last), *others = pairwise(bounds)
    running = [_pool().submit(loop, *part) for part in others]
    loop(first, last)
    for each in running:
        each.result()


def even_bounds(n: int, n_parts: int) -> list[int]:
    """The bounds of at most `n_parts` nearly equal parts of range(n), n at least 1."""
    n_parts = min(n, n_parts)
    return [n * part // n_parts for part in range(n_parts + 1)]
