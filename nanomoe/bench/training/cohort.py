"""Jobs of one shape trained together by one process, against the same jobs one after another.

A turn is so many steps of every member, without evaluations, and as many of one job that has the device for itself. On
a CPU both go through the loops of the jobs, the one with the number of threads that is fastest for it; on a GPU they
are the steps of one stacked program, and those that such a job has alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nanomoe.bench.training.shapes import SHAPES, Shape
from nanomoe.config import JobConfig
from nanomoe.training.cohort import Left, Member, stack, train_together
from nanomoe.training.loop import Happened, StopAfter, train
from nanomoe.training.run import prepare
from nanomoe.training.steps.choice import StepPath, not_captured_because
from nanomoe.training.steps.stacked import Lane

NARROW = Shape("narrow", JobConfig(n_embd=64), 8_192, n_windows=1, length=87)
NARROW_BYTES = Shape("narrow-bytes", JobConfig(n_embd=64, tokenizer="bytes"), 256, n_windows=1, length=87)

_SHAPES = (SHAPES["reference"], NARROW, NARROW_BYTES)
"""The reference run's; the same with half its channels; and that on bytes, of which little is the output layer."""

_EPOCHS = 1_000_000
"""So many that no turn reaches the second checkpoint."""

_WARM_UP = 3
"""Steps of a run before its first turn; the first checkpoint comes after the first of them."""


@dataclass(frozen=True)
class CohortFigures:
    """What was measured of one number of members of one shape."""

    shape: str
    """Name of the shape."""

    n_members: int
    """Runs that were trained together."""

    n_threads_alone: int
    """Threads of a step of the run that was trained alone."""

    seconds_alone: float
    """Seconds of a step of the run that was trained alone: the median of the turns."""

    seconds_together: float
    """Seconds over the steps of all members, without the start of their processes: the median of the turns."""

    times_as_fast: float
    """The first over the second: the median of the turns' ratios."""


def shapes(*, with_mixture: bool) -> list[Shape]:
    """The shapes that are measured, each followed by its twin with a mixture where that is wanted too."""
    return [each for shape in _SHAPES for each in ([shape, shape.mixture()] if with_mixture else [shape])]


def measure(
    shape: Shape,
    n_members: int,
    device: torch.device,
    *,
    turns: int,
    steps: int,
    said: Callable[[str], None] = lambda _: None,
    path: StepPath | None = None,
) -> CohortFigures:
    """Measure `n_members` runs of a shape, in alternating turns with a run alone, each of `steps` steps of every run.
    `path`: the way of doing a step alone, and on a CPU together too; as a job's would be by default. `said` is told
    what is being measured."""
    name = f"{shape.name}, {n_members} together"
    said(f"{name}: first steps")
    n_threads = torch.get_num_threads()
    try:
        alone: _Runs | _StackedRuns
        together: _Runs | _StackedRuns
        if not_captured_because(device) is None:
            alone, together = _StackedRuns(shape, device, 1, path), _StackedRuns(shape, device, n_members, "stacked")
        else:
            alone, together = _Runs(shape, path or "fused", [None]), _Runs(shape, path or "fused", [1] * n_members)
        seconds_alone, seconds_together = [], []
        for turn in range(turns):
            said(f"{name}: turn {turn + 1} of {turns}")
            seconds_alone.append(alone.seconds_a_step(steps))
            seconds_together.append(together.seconds_a_step(steps))
    finally:
        torch.set_num_threads(n_threads)
    ratios = (one / other for one, other in zip(seconds_alone, seconds_together, strict=True))
    return CohortFigures(
        shape=shape.name,
        n_members=n_members,
        n_threads_alone=alone.runs[0].n_threads,
        seconds_alone=statistics.median(seconds_alone),
        seconds_together=statistics.median(seconds_together),
        times_as_fast=statistics.median(ratios),
    )


class _Runs:
    """One run, or several that are trained together, which go on from turn to turn."""

    def __init__(self, shape: Shape, path: StepPath, threads: list[int | None]) -> None:
        """`threads`: those of each run's steps; None for as many as are fastest for it."""
        tokenizer = shape.tokenizer()
        text = shape.text(tokenizer)
        config = shape.config.model_copy(update={"epochs": _EPOCHS})
        self.runs = [
            prepare(config.model_copy(update={"seed": seed}), text, tokenizer, path=path, n_threads=n_threads).run
            for seed, n_threads in enumerate(threads)
        ]
        self._train(_WARM_UP, n_processes=1)  # in this process, so that others begin with what it has left

    def seconds_a_step(self, steps: int) -> float:
        """Do so many steps of each, and three times as many; seconds over those that are more, so that the start of
        processes is left out."""
        short, long = (self._train(n, n_processes=None) for n in (steps, 3 * steps))
        return max(long - short, 1e-9) / (2 * steps * len(self.runs))

    def _train(self, steps: int, n_processes: int | None) -> float:
        """Do so many steps of each; the seconds that it took."""
        began = time.perf_counter()
        for _ in self._events(steps, n_processes):
            pass
        return time.perf_counter() - began

    def _events(self, steps: int, n_processes: int | None) -> Iterator[Happened | Left]:
        if len(self.runs) == 1:
            torch.set_num_threads(self.runs[0].n_threads)
            yield from train(self.runs[0], StopAfter(self.runs[0], steps))
        else:
            members = [Member(str(n), run, StopAfter(run, steps)) for n, run in enumerate(self.runs)]
            for _, happened in train_together(members, n_processes=n_processes):
                yield happened


class _StackedRuns:
    """Runs on a device that captures their steps: one with steps of its own, or several in one program."""

    def __init__(self, shape: Shape, device: torch.device, n: int, path: StepPath | None) -> None:
        tokenizer = shape.tokenizer()
        text = shape.text(tokenizer)
        config = shape.config.model_copy(update={"epochs": _EPOCHS})
        width = n if path == "stacked" else None
        self._device = device
        self.runs = [
            prepare(
                config.model_copy(update={"seed": seed}), text, tokenizer, device=str(device), path=path, width=width
            ).run
            for seed in range(n)
        ]
        if width is not None:
            stack(self.runs, width)
        self._programs = {run.step.program for run in self.runs if isinstance(run.step, Lane)}
        self.seconds_a_step(_WARM_UP)

    def seconds_a_step(self, steps: int) -> float:
        """Do so many steps of each; seconds over the steps of all."""
        began = time.perf_counter()
        for _ in range(steps):
            for run in self.runs:
                run.train_step()
            for program in self._programs:
                program.advance()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - began) / (steps * len(self.runs))
