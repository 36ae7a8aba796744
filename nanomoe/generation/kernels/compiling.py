"""How the loops of generation are compiled, and what this processor can do."""

from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt

from nanomoe.compiling import LoopPackage

Ids = npt.NDArray[np.int64]

LOOPS = LoopPackage(Path(__file__).parent)
"""The loops of generation."""

compiled = LOOPS.compiled
compiled_in_any_order = LOOPS.compiled_in_any_order
are_compiled = LOOPS.are_compiled
mark_compiled = LOOPS.mark_compiled


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
