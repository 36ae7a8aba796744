"""How many threads a fused step takes: measured once for a shape on a machine, and kept on the disk.

More are not always faster. Small products wait longer for each other's threads than they save, and beside other
programs a thread that has lost its core holds up all of them.
"""

import hashlib
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from nanomoe.compiling import compiled_for
from nanomoe.config import JobConfig
from nanomoe.plan import Plan
from nanomoe.training.steps.loops.compiling import LOOPS

_TURNS = 5
_SECONDS = 0.3
"""After which no further turn begins."""

_MOST_ROWS = 128
"""Rows of the output layer that are measured."""

_FEWEST_OPERATIONS = 2_000_000
"""Multiply-adds of an MLP's product. One of fewer takes a thread some fifty microseconds, about what it costs to share
it out; assumed, and not measured for each such shape."""

_MOST_WEIGHTS = 20_000_000
"""With more, products are large enough for all threads, and measuring them would take its time."""


def measured_threads(config: JobConfig, vocab_size: int, n_tokens: int, dtype: torch.dtype, most: int) -> int:
    """One, or `most`: the faster for the steps of this job. Takes half a second, and only the first time that a shape
    is seen which is neither tiny nor large."""
    plan = Plan.of(config, n_tokens)
    windows = min(config.batch_size, plan.n_windows)
    length = min(plan.n_train_tokens, config.block_size)
    n_weights = (vocab_size + config.block_size + 12 * config.n_layer * config.n_embd) * config.n_embd
    if most == 1 or n_weights > _MOST_WEIGHTS:
        return most
    if windows * length * 4 * config.n_embd**2 < _FEWEST_OPERATIONS:
        return 1
    shape = (windows, length, vocab_size, config.n_embd, config.n_layer, config.n_head, dtype)
    place = _place((*shape, most, os.cpu_count(), compiled_for(), torch.__version__))
    if not place.exists():
        fastest = _measure(config, vocab_size, windows * length, dtype, most)
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_suffix(f".{os.getpid()}")
        new.write_text(str(fastest))
        new.replace(place)
    return int(place.read_text())


def _place(key: tuple[object, ...]) -> Path:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return LOOPS.folder / f"threads-{digest}"


def _measure(config: JobConfig, vocab_size: int, n_rows: int, dtype: torch.dtype, most: int) -> int:
    """In alternating turns of one thread and of `most`, the products of a step: nearly all that threads share."""
    C = config.n_embd
    hidden = torch.zeros(n_rows, 4 * C, dtype=dtype), torch.zeros(4 * C, C, dtype=dtype)
    logits = torch.zeros(min(n_rows, _MOST_ROWS), vocab_size, dtype=dtype), torch.zeros(vocab_size, C, dtype=dtype)
    seconds: dict[int, list[float]] = {1: [], most: []}
    before = torch.get_num_threads()
    began = time.monotonic()
    try:
        while len(seconds[most]) <= _TURNS and (len(seconds[most]) < 2 or time.monotonic() - began < _SECONDS):
            for n_threads, turns in seconds.items():
                torch.set_num_threads(n_threads)
                # A layer has three times the weights of an MLP's first matrix.
                turns.append(3 * config.n_layer * _seconds(*hidden) + _seconds(*logits))
    finally:
        torch.set_num_threads(before)
    # Of a tie the fewer; not the first turn, which fills caches. The median: a stall may come to any turn.
    return min(seconds, key=lambda n_threads: (statistics.median(seconds[n_threads][1:]), n_threads))


def _seconds(out_NF: Tensor, weight_FC: Tensor) -> float:
    """Seconds of a matrix's three products: a layer's output, and the gradients of its input and of its weights."""
    x_NC = torch.zeros(len(out_NF), weight_FC.shape[1], dtype=out_NF.dtype)
    began = time.perf_counter()
    torch.mm(x_NC, weight_FC.t(), out=out_NF)
    torch.mm(out_NF, weight_FC, out=x_NC)
    torch.mm(out_NF.t(), x_NC, out=weight_FC)
    return time.perf_counter() - began
