"""How many runs of one shape are trained together on this CPU: measured once, and kept on the disk.

Each member's steps take one thread, and each core has a process for its part of the members, so that as many members as
there are cores keep all of them busy, where the cores do not wait for the same memory or are two halves of one. A
cohort has twice as many: when its last members train, a core is idle for each that has none, and the more members there
were before, the smaller a part of the time that is.
"""

import time
from collections.abc import Callable

import torch

from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.cohort import Member, train_together
from nanomoe.training.loop import StopAfter
from nanomoe.training.measured_once import measured_once
from nanomoe.training.run import Run, prepare

_FOR_EACH_CORE = 2
"""Members for each core that company keeps busy: of c cores and M members of which one has twice the steps of the
others, (c - 1) / (M + c) of the time is idle in the end, a sixth of two cores' where M is twice c, and a quarter where
it is c. More members would have each job, and those behind it, wait longer."""

_LEAST_GAIN = 0.1
"""By which a doubled number of members must shorten a member's step."""

_STEPS = 24
_TURNS = 2

_CONFIG = JobConfig(tokenizer="bytes", n_layer=2, n_head=4, n_embd=64, block_size=64, batch_size=2, epochs=1000)
_TEXT = "Era uma vez um pequeno modelo que aprendia a ler. " * 6


def measured_cohort_width(n_cores: int) -> int:
    """Most members of a cohort in a process that has `n_cores` cores; 1 where company gains nothing. Takes less than
    two seconds, and only the first time."""
    if n_cores == 1:
        return 1
    path = _prepare(0).path
    kept_busy = measured_once("cohort", (n_cores, path), lambda: _measure(n_cores))
    return _FOR_EACH_CORE * kept_busy if kept_busy > 1 else 1


def _prepare(seed: int) -> Run:
    config = _CONFIG.model_copy(update={"seed": seed})
    return prepare(config, _TEXT, load_tokenizer(config.tokenizer), n_threads=1).run


def _measure(n_cores: int) -> int:
    """One, two, four and so on, `n_cores` at most: the number of members that a double of gains nothing more."""
    runs = [_prepare(seed) for seed in range(n_cores)]
    before = torch.get_num_threads()
    try:
        for run in runs:  # in this process, so that others begin with what it has left
            run.train_step()
        return number_that_pays(lambda n: _seconds(runs[:n]), n_cores)
    finally:
        torch.set_num_threads(before)


def number_that_pays(
    seconds: Callable[[int], float], most: int, *, may_go_on: Callable[[], bool] = lambda: True
) -> int:
    """One, two, four and so on, `most` at most: the number of members that a double of gains nothing more.

    Args:
        seconds: of a member's step, by the number of members; is called for ever larger numbers.
        may_go_on: whether there is time to measure a larger number.
    """
    best, n = 1, 2
    of_best = seconds(1)
    while n <= most and may_go_on():
        together = seconds(n)
        if together > (1 - _LEAST_GAIN) * of_best:
            break
        best, of_best, n = n, together, 2 * n
    return best


def _seconds(runs: list[Run]) -> float:
    """Seconds of a member's step: what more steps take, so that the start of processes is left out; the least of some
    turns, which is the least disturbed."""
    short, long = (min(_turn(runs, n) for _ in range(_TURNS)) for n in (_STEPS, 3 * _STEPS))
    return max(long - short, 1e-9) / (2 * _STEPS * len(runs))


def _turn(runs: list[Run], n_steps: int) -> float:
    began = time.perf_counter()
    members = [Member(str(n), run, StopAfter(run, n_steps)) for n, run in enumerate(runs)]
    for _ in train_together(members, n_processes=len(runs)):
        pass
    return time.perf_counter() - began
