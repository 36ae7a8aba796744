"""How many threads a fused step takes: measured once for a shape on a machine, and kept on the disk.

More are not always faster: threads of a small model wait longer for each other than they save.
"""

import statistics
import time

import torch

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.gpt import GPT
from nanomoe.model.size import n_params
from nanomoe.plan import Plan
from nanomoe.training.measured_once import measured_once
from nanomoe.training.steps.fused import FusedStep

_TURNS = 5
_SECONDS = 0.3
"""After which no further turn begins."""

_FEWEST_OPERATIONS = 2_000_000
"""Multiply-adds of an MLP's product. One of fewer takes a thread some fifty microseconds, about as long as it takes to
wait for another; assumed, and not measured for each such shape."""

_MOST_WEIGHTS = 20_000_000
"""With more, a step is long enough for all threads, and measuring would take its time."""

_MOST_TOKENS = 1024
"""Tokens of the micro-batch that is measured; with more, shares are only larger."""


def measured_threads(config: JobConfig, vocab_size: int, n_tokens: int, dtype: torch.dtype, most: int) -> int:
    """One, two, four and so on, or `most`: the fastest for the steps of this job. Takes half a second, and only the
    first time that a shape is seen which is neither tiny nor large."""
    plan = Plan.of(config, n_tokens)
    length = min(plan.n_train_tokens, config.block_size)
    windows = min(config.batch_size, plan.n_windows, max(1, _MOST_TOKENS // length))
    if most == 1 or n_params(config, vocab_size) > _MOST_WEIGHTS:
        return most
    if windows * length * 4 * config.n_embd**2 < _FEWEST_OPERATIONS:
        return 1
    mixture = (config.moe_layers, config.n_experts, config.k, config.n_shared_experts, config.expert_hidden)
    shape = (windows, length, vocab_size, config.n_embd, config.n_layer, config.n_head, mixture, dtype)
    return measured_once("threads", (*shape, most), lambda: _measure(config, vocab_size, windows, length, dtype, most))


def _measure(config: JobConfig, vocab_size: int, windows: int, length: int, dtype: torch.dtype, most: int) -> int:
    """Steps of a model that nobody keeps, in alternating turns of each number of threads."""
    tokens = torch.arange(windows * length + 1) % vocab_size
    steps: dict[int, FusedStep] = {}
    before = torch.get_num_threads()
    model = GPT.build(config, vocab_size)
    model.init_weights(0)
    try:
        for n_threads in sorted({most} | {2**power for power in range(most.bit_length())}):
            torch.set_num_threads(n_threads)
            steps[n_threads] = FusedStep(model, Windows(tokens, length), config, dtype)
    finally:
        torch.set_num_threads(before)
    seconds: dict[int, list[float]] = {n_threads: [] for n_threads in steps}
    began = time.monotonic()
    while len(seconds[most]) <= _TURNS and (len(seconds[most]) < 3 or time.monotonic() - began < _SECONDS):
        for n_threads, step in steps.items():
            started = time.perf_counter()
            step.begin()
            step.add(0, range(windows), windows * length)
            step.update()
            seconds[n_threads].append(time.perf_counter() - started)
    # Of a tie the fewer; not the first turn, which fills caches. The median: a stall may come to any turn.
    return min(seconds, key=lambda n_threads: (statistics.median(seconds[n_threads][1:]), n_threads))
