"""What this machine can do at best: the limits that stand beside every measured figure."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

_TURNS = 7
"""Tries of which the best counts: a limit is what the machine has shown it can do."""

_SECONDS = 0.05
"""Least duration of a try."""

_MANY_TURNS = 15
_SHORT_SECONDS = 0.003
"""Number and least duration of tries where many small things are measured: beside other programs, one of many short
tries is more often undisturbed than one of few long ones."""

_CPU = torch.device("cpu")


def name(device: torch.device = _CPU) -> str:
    """Model of the GPU, or of the processor as the operating system names it with its number of usable threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor() or platform.machine())
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def best_seconds(work: Callable[[], object]) -> float:
    """The least time that one call of `work` has taken, in seconds: the mean of the fastest of several tries."""
    return _best_seconds(work, _CPU, _TURNS, _SECONDS)


def best_short_seconds(work: Callable[[], object], device: torch.device = _CPU) -> float:
    """The same from many short tries; `work` may only have begun on a GPU when it returns."""
    return _best_seconds(work, device, _MANY_TURNS, _SHORT_SECONDS)


def _best_seconds(work: Callable[[], object], device: torch.device, turns: int, seconds: float) -> float:
    work()
    n_calls = 1
    while _time(work, n_calls, device) < seconds:
        n_calls *= 2
    return min(_time(work, n_calls, device) for _ in range(turns)) / n_calls


def _time(work: Callable[[], object], n_calls: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(n_calls):
        work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(n_bytes: int, device: torch.device = _CPU) -> float:
    """Bytes a second at which `n_bytes` that are read again and again come in: from a cache, where they fit one.

    The sum of float32 numbers, by all threads.
    """
    numbers = torch.ones(max(1, n_bytes // 4), device=device)
    return numbers.nbytes / _best_seconds(numbers.sum, device, _TURNS, _SECONDS)


def stream_bandwidth(n_bytes: int, device: torch.device = _CPU) -> float:
    """Bytes a second, read and written, of a sum of two arrays into a third that together have `n_bytes`.

    By all threads; from a cache, where the arrays fit one.
    """
    n = max(1, n_bytes // 12)
    one, other, total = torch.ones(n, device=device), torch.ones(n, device=device), torch.empty(n, device=device)
    return 3 * total.nbytes / best_short_seconds(lambda: torch.add(one, other, out=total), device)


def peak_flops_per_sec(dtype: torch.dtype, device: torch.device = _CPU) -> float:
    """Floating-point operations a second of a product of square matrices that are large for the device."""
    n = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * n**3 / best_short_seconds(lambda: torch.mm(one, other, out=out), device)
