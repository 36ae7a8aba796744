"""The innermost loops of generation, compiled for the CPU they run on; plain tensor operations stand beside each.

numba compiles them at their first call on a kind of processor and keeps the result beside the source, or in
`NUMBA_CACHE_DIR`. It compiles a loop anew when the loop's own file changes, not when a constant or a loop that it takes
from another file does: after such a change, delete what it kept. Importing it takes a third of a second, so only an
engine that will serve many tokens does.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch

F = TypeVar("F", bound=Callable[..., Any])

Array = npt.NDArray[np.float32]

_MOST_THREADS: int = numba.get_num_threads()

_FLAGS = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order, which is what makes them fast; infinities and NaN stay what they are."""


def compiled(function: F) -> F:
    """Compile a function; its loops run on the thread that calls it."""
    return cast(F, numba.njit(cache=True, fastmath=_FLAGS)(function))


def compiled_parallel(function: F) -> F:
    """Compile a function; its `numba.prange` loops are shared among the threads of `use_threads`."""
    return cast(F, numba.njit(cache=True, fastmath=_FLAGS, parallel=True)(function))


def use_threads(n_rows: int) -> None:
    """Let parallel loops use as many threads as torch does now; one for a single row."""
    most = 1 if n_rows == 1 else torch.get_num_threads()
    numba.set_num_threads(min(most, _MOST_THREADS))
