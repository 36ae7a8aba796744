"""Figures of this machine that are measured once and kept on the disk, beside the loops that are compiled for it."""

import hashlib
import os
from collections.abc import Callable

import torch

from nanomoe.compiling import compiled_for
from nanomoe.training.steps.loops.compiling import LOOPS


def measured_once(what: str, key: tuple[object, ...], measure: Callable[[], int]) -> int:
    """A figure by its name and what it depends on, beside the processor, torch's version and what loops are compiled
    for: `measure` is called where it is not kept yet."""
    whole = (*key, os.cpu_count(), compiled_for(), torch.__version__)
    digest = hashlib.sha256(repr(whole).encode()).hexdigest()[:16]
    place = LOOPS.folder / f"{what}-{digest}"
    if not place.exists():
        figure = measure()
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_suffix(f".{os.getpid()}")
        new.write_text(str(figure))
        new.replace(place)
    return int(place.read_text())
