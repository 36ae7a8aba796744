"""How the loops of training are compiled."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanomoe.compiling import LoopPackage

Keys = npt.NDArray[np.uint32]

_HERE = Path(__file__).parent

LOOPS = LoopPackage(_HERE, _HERE.parents[2] / "model" / "dropout.py")
"""The loops of training."""

compiled = LOOPS.compiled
compiled_in_any_order = LOOPS.compiled_in_any_order
