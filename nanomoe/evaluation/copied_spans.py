"""Memorised or learned? The longest span that a text shares with the training text. Knows no model and no torch.

numpy is imported with the first comparison: every start of the API imports this module, and few ever compare.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MODULUS = (1 << 31) - 1
_BASE = 1_000_003
_PART = 1 << 22
"""Bytes of the training text that are hashed at once: bounds the memory to some 150 MB."""


@dataclass(frozen=True)
class CopiedSpan:
    """The longest run of bytes that two texts share; of several, the first in the scored one."""

    n_bytes: int
    start: int
    """Where it begins in the scored text, in bytes."""
    training_start: int
    """Where it first begins in the training text, in bytes."""


def longest_copied_span(scored: bytes, training: bytes) -> CopiedSpan:
    """The longest span of `scored` that stands in `training`, byte for byte.

    A shared span of n bytes has shared parts of every smaller length, so n is found by bisection; whether any span of a
    given length is shared is asked of their hashes (Karp and Rabin, 1987), and whatever the hashes say is compared
    byte by byte: time grows with the texts' lengths times the logarithm of the span's.
    """
    found = CopiedSpan(0, 0, 0)
    low, high = 0, min(len(scored), len(training))
    while low < high:
        middle = (low + high + 1) // 2
        shared = _shared_span(scored, training, middle)
        if shared is None:
            high = middle - 1
        else:
            low, found = middle, shared
    return found


def _shared_span(scored: bytes, training: bytes, length: int) -> CopiedSpan | None:
    import numpy as np

    mine = _hashes(scored, length)
    known = np.zeros(len(mine), dtype=bool)
    for at in range(0, len(training) - length + 1, _PART):
        known |= np.isin(mine, _hashes(training[at : at + _PART + length - 1], length))
    for start in np.flatnonzero(known).tolist():
        training_start = training.find(scored[start : start + length])
        if training_start >= 0:
            return CopiedSpan(length, start, training_start)
    return None


def _hashes(text: bytes, length: int) -> "NDArray[np.uint64]":
    """The hash of every span of `length` bytes, built from those of spans of 1, 2, 4, ... bytes."""
    import numpy as np

    modulus = np.uint64(_MODULUS)
    total = np.zeros(len(text) - length + 1, dtype=np.uint64)
    doubled = np.frombuffer(text, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    size, done = 1, 0
    while True:
        if length & size:
            shift = np.uint64(pow(_BASE, size, _MODULUS))
            total = (total * shift + doubled[done : done + len(total)]) % modulus
            done += size
        if size * 2 > length:
            return total
        shift = np.uint64(pow(_BASE, size, _MODULUS))
        doubled = (doubled[:-size] * shift + doubled[size:]) % modulus
        size *= 2
