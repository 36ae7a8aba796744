"""What this machine can do at best: the limits that stand beside every measured figure."""

import time
from collections.abc import Callable

import torch

_TURNS = 7
"""Tries of which the best counts: a limit is what the machine has shown it can do."""

_SECONDS = 0.05
"""Least duration of a try."""


def best_seconds(work: Callable[[], object]) -> float:
    """The least time that one call of `work` has taken, in seconds: the mean of the fastest of several tries."""
    work()
    n_calls = 1
    while _time(work, n_calls) < _SECONDS:
        n_calls *= 2
    return min(_time(work, n_calls) for _ in range(_TURNS)) / n_calls


def _time(work: Callable[[], object], n_calls: int) -> float:
    began = time.perf_counter()
    for _ in range(n_calls):
        work()
    return time.perf_counter() - began


def read_bandwidth(n_bytes: int) -> float:
    """Bytes a second at which `n_bytes` that are read again and again come in: from a cache, where they fit one.

    The sum of float32 numbers, by all threads.
    """
    numbers = torch.ones(max(1, n_bytes // 4))
    return numbers.nbytes / best_seconds(numbers.sum)
