"""A loop's rows shared among threads. Which thread does which rows depends on how many threads there are alone, so that
sums over parts, taken in their order, repeat byte for byte."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="loops")


def sum_in_parts(loop: Callable[[slice], float], n_rows: int) -> float:
    """The sum of what a loop, which needs no interpreter, gives for each part of its rows: one for each of the threads
    that torch may use."""
    n_parts = min(torch.get_num_threads(), n_rows)
    if n_parts <= 1:
        return loop(slice(0, n_rows))
    bounds = [n_rows * part // n_parts for part in range(n_parts + 1)]
    first, *others = (slice(*bound) for bound in pairwise(bounds))
    running = [_pool().submit(loop, part) for part in others]
    return sum([loop(first), *(each.result() for each in running)])
