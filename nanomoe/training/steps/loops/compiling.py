"""How the loops of training are compiled, and where the result is kept."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt

F = TypeVar("F", bound=Callable[..., Any])

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Keys = npt.NDArray[np.uint32]

_HERE = Path(__file__).parent


def _kept_in() -> Path:
    """A folder for what these very sources compile to. numba notices by itself when a loop's own file has changed, but
    not when a loop or a constant that it takes from another file has."""
    sources = [*sorted(_HERE.glob("*.py")), _HERE.parents[2] / "model" / "dropout.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    beside = _HERE / "__pycache__" if os.access(_HERE, os.W_OK) else Path.home() / ".cache" / "nanomoe"
    return Path(os.environ.get("NUMBA_CACHE_DIR") or beside) / digest


_FOLDER = _kept_in()


def _mark() -> Path:
    """The file that says that all loops are kept for this processor, in the form that this numba reads."""
    processor = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
    digest = hashlib.sha256(repr((numba.__version__, processor)).encode()).hexdigest()[:16]
    return _FOLDER / f"compiled-{digest}"


def folder() -> Path:
    """Where what was compiled is kept, and what was measured of it."""
    return _FOLDER


def are_compiled() -> bool:
    """Whether every loop has been compiled for this processor and is kept, so that loading it compiles nothing."""
    return _mark().exists()


def mark_compiled() -> None:
    """Note that every loop has been compiled for this processor and is kept."""
    _mark().parent.mkdir(parents=True, exist_ok=True)
    _mark().touch()


def compiled_for() -> str:
    """The compiler and the processor whose instructions it chose: with others the same loop may round otherwise."""
    return f"numba {numba.__version__}, {llvmlite.binding.get_host_cpu_name()}"


def _jit(function: F, flags: set[str]) -> F:
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined] # set by numba at run time
    numba.config.CACHE_DIR = str(_FOLDER)  # type: ignore[attr-defined] # set by numba at run time
    try:
        # Divisions by zero give infinity or NaN, as in torch. A check of each would keep loops from being vectorised.
        return cast(F, numba.njit(cache=True, error_model="numpy", nogil=True, fastmath=flags)(function))
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined] # set by numba at run time


def compiled_exactly(function: F) -> F:
    """Compile a function whose operations are done in the order that it says."""
    return _jit(function, {"contract"})


def compiled(function: F) -> F:
    """Compile a function whose sums may be taken in any order, which is what lets a row be summed in vectors. The
    compiler chooses the order once; infinities and NaN stay what they are."""
    return _jit(function, {"contract", "reassoc", "nsz", "arcp"})
