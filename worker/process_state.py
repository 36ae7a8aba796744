"""What a job might change in its trainer's process, and how it is put back, so that a job's bytes are the same whether
it is a process's first or its hundredth.

Knows no job. Whatever cannot be put back is named, and the process ends.
"""

import ctypes
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

JOIN_SECONDS = 0.5
"""How long the threads of a job that has ended are waited for. The evaluation of a cancelled job's first checkpoint
ends before its next batch, within a fraction of a second for a small model; a new process takes seconds."""

MOST_GROWN_BYTES = 512 * 2**20
"""Resident memory that a process may have gained since it was new: what allocators keep, and no more. Assumed."""

MOST_DEVICE_BYTES = 256 * 2**20
"""Memory of a GPU that may stay allocated: workspaces of its libraries, and captured steps that are kept for the next
jobs. These are forgotten where all together are more. Assumed."""

_PAGES = Path("/proc/self/statm")


class ProcessState:
    """The process as it was before its first job."""

    def __init__(self, forget_steps: Callable[[], None] = lambda: None) -> None:
        """`forget_steps` gives up the captured steps that are kept."""
        self._forget_steps = forget_steps
        self._threads = set(threading.enumerate())
        self._n_threads = torch.get_num_threads()
        self._environment = dict(os.environ)
        self._resident_bytes = _resident_bytes()

    def restore(self) -> None:
        """Put back every setting of the process that a job or a library might have changed."""
        os.environ.clear()
        os.environ.update(self._environment)
        torch.set_num_threads(self._n_threads)
        if torch.are_deterministic_algorithms_enabled():  # not otherwise: the call imports torch's compiler
            torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        # No job of ours draws from these; one that did by mistake would at least do it alike every time.
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

    def what_is_left(self) -> str | None:
        """Wait for the threads of a job that has ended, and free its memory; what of it is left all the same, in words,
        or None."""
        give_up = time.monotonic() + JOIN_SECONDS
        for thread in set(threading.enumerate()) - self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
            if thread.is_alive():
                return f"the thread {thread.name} still runs"
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            if torch.cuda.memory_reserved() > MOST_DEVICE_BYTES:  # the memory of graphs stays reserved, used or not
                self._forget_steps()
                gc.collect()
                torch.cuda.empty_cache()
            if (allocated := torch.cuda.memory_allocated()) > MOST_DEVICE_BYTES:
                return f"{allocated} bytes of the GPU are still allocated"
        _give_freed_memory_back()
        if (grown := _resident_bytes() - self._resident_bytes) > MOST_GROWN_BYTES:
            return f"the process holds {grown} bytes more than when it was new"
        return None


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where only Linux could tell."""
    if not _PAGES.exists():
        return 0
    return int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_freed_memory_back() -> None:
    """Ask glibc to return what was freed to the system: it keeps it otherwise, and it would count as growth."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
