"""The innermost loops of generation, compiled for the CPU they run on; plain tensor operations stand beside each.

numba compiles them at their first call on a kind of processor and keeps the result beside the source, or in
`NUMBA_CACHE_DIR`. Importing it takes a third of a second, so only an engine that will serve many tokens does.
"""

import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch

F = TypeVar("F", bound=Callable[..., Any])

Array = npt.NDArray[np.float32]

_HERE = Path(__file__).parent


def _kept_in() -> Path:
    """A folder for what these very sources compile to. numba notices by itself when a loop's own file has changed, but
    not when a loop or a constant that it takes from another file has."""
    constants = [_HERE.parent / name for name in ("int8.py", "model/moe.py", "sampling.py")]
    sources = [*sorted(_HERE.glob("*.py")), *constants]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
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


_TORCH_THREADS = torch.get_num_threads()
_MOST_THREADS: int = numba.get_num_threads()
# With the OpenMP that both share, numba has just told torch to use every core; sums over other shares round otherwise.
torch.set_num_threads(_TORCH_THREADS)

_FLAGS = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order, which is what makes them fast; infinities and NaN stay what they are."""


# Divisions by zero give infinity or NaN, as they do in torch. A check of each would keep loops from being vectorised.
_HOW: dict[str, Any] = {"cache": True, "fastmath": _FLAGS, "error_model": "numpy"}

_ONE_AT_A_TIME = threading.Lock()
"""Where there is no OpenMP, numba ends the process if two threads are in its parallel loops."""


def compiled(function: F) -> F:
    """Compile a function; its loops run on the thread that calls it."""
    return cast(F, numba.njit(**_HOW)(function))


def compiled_parallel(function: F) -> F:
    """Compile a function; its `numba.prange` loops are shared among the threads of `use_threads`. To be called by
    Python alone."""
    loops = numba.njit(**_HOW, parallel=True)(function)

    @functools.wraps(function)
    def alone(*arguments: Any) -> Any:
        with _ONE_AT_A_TIME:
            return loops(*arguments)

    return cast(F, alone)


def use_threads(n_rows: int) -> int:
    """Let parallel loops use as many threads as torch does now, and one for a single row; returns how many."""
    n_threads: int = 1 if n_rows == 1 else min(torch.get_num_threads(), _MOST_THREADS)
    numba.set_num_threads(n_threads)
    return n_threads
