"""Memorised or learned? The loss of each token of any text, and the longest span copied from the training text.

Knows no HTTP and no file.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nanomoe.data import IGNORE, Windows
from nanomoe.model import GPT, token_losses

_MODULUS = np.uint64((1 << 31) - 1)
_BASE = 1_000_003


@dataclass(frozen=True)
class CopiedSpan:
    """The longest run of bytes that two texts share; of several, the first in the scored one."""

    n_bytes: int
    start: int
    """Where it begins in the scored text, in bytes."""
    training_start: int
    """Where it first begins in the training text, in bytes."""


@torch.no_grad()
def losses_of_tokens(model: GPT, tokens: list[int]) -> list[float]:
    """Cross-entropy of every token but the first, in nats, dropout off; a long text in windows as in training."""
    model.eval()
    device = next(model.parameters()).device
    windows = Windows(torch.tensor(tokens, device=device), model.config.block_size)
    losses: list[float] = []
    for batch in windows.batches(16):
        inputs_BT, targets_BT = windows.batch(batch)
        losses += token_losses(model(inputs_BT).logits_BTV, targets_BT)[targets_BT != IGNORE].tolist()
    return losses


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
    mine, theirs = _hashes(scored, length), _hashes(training, length)
    for start in np.flatnonzero(np.isin(mine, theirs)).tolist():
        training_start = training.find(scored[start : start + length])
        if training_start >= 0:
            return CopiedSpan(length, start, training_start)
    return None


def _hashes(text: bytes, length: int) -> NDArray[np.uint64]:
    """The hash of every span of `length` bytes, built from those of spans of 1, 2, 4, ... bytes."""
    total = np.zeros(len(text) - length + 1, dtype=np.uint64)
    doubled = np.frombuffer(text, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    size, done = 1, 0
    while True:
        if length & size:
            shift = np.uint64(pow(_BASE, size, int(_MODULUS)))
            total = (total * shift + doubled[done : done + len(total)]) % _MODULUS
            done += size
        if size * 2 > length:
            return total
        shift = np.uint64(pow(_BASE, size, int(_MODULUS)))
        doubled = (doubled[:-size] * shift + doubled[size:]) % _MODULUS
        size *= 2
