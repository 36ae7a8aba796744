"""Training steps of a shape and of its twin with a mixture, in alternating turns with other implementations.

A machine whose speed drifts treats all alike: a figure is the median of the turns, a ratio the median of the ratios
within each turn. All begin with the same weights and do the same number of steps; the loss afterwards shows it.
"""

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from nanomoe.bench import machine
from nanomoe.bench.training import limit, peers, ways
from nanomoe.bench.training.contender import Contender, NotMeasured
from nanomoe.bench.training.limit import Limit
from nanomoe.bench.training.shapes import Shape

Key = TypeVar("Key", bound=Hashable)

LOOP_OVER_EXPERTS = "loop over experts"
"""The eager steps of a mixture, but as most published code computes the experts."""

_WARM_UP = 3
"""Steps before the first turn."""


@dataclass(frozen=True)
class Measured:
    """The steps of one contender, over the turns."""

    who: str
    """Way of the program, or name of the peer."""

    is_peer: bool
    """Whether it is another implementation."""

    precision: str
    """Type of activations and matrix products."""

    n_threads: int
    """Threads of an operation on the CPU."""

    seconds: float
    """Seconds of a step: the median."""

    tok_per_sec: float
    """Tokens of a step over its seconds."""

    loss: float
    """Loss of the text after the last step, without dropout, nats per token."""

    mfu: float
    """Model FLOPs utilisation: 6 N + 12 L H Q T operations per token, over the rate of one large product."""

    over_limit: float
    """Seconds of a step over the limit's."""

    times_as_fast_as: dict[str, float]
    """Each peer's seconds over this one's: the median of the turns' ratios."""

    over_dense: float | None = None
    """Seconds of a mixture's step over those of the dense twin, done in the same way; None where there is none."""


@dataclass(frozen=True)
class StepFigures:
    """What was measured of the steps of one shape."""

    shape: str
    """Name of the shape."""

    machine: str
    """Processor or GPU that did the steps."""

    vocab_size: int
    n_windows: int
    length: int
    """Tokens of a window."""

    n_params: int
    n_active_params: int
    """Parameters that one token meets."""

    dropout: float
    """Share of activations that is dropped."""

    n_steps: int
    """Optimizer steps that each contender did."""

    flops_per_step: int
    """Floating-point operations of a step by the published formula."""

    measured: list[Measured]
    limits: dict[str, Limit]
    """By the type of the products."""

    limit_seconds: dict[str, float]
    """Least seconds of a step, by the type of the products."""

    not_measured: dict[str, str]
    """Contenders that could not be measured, and why."""


def measure(
    shape: Shape,
    device: torch.device,
    *,
    turns: int,
    steps: int,
    with_mixture: bool = True,
    with_transformers: bool = True,
    nanogpt: Path | None = None,
    said: Callable[[str], None] = lambda _: None,
) -> list[StepFigures]:
    """Measure a shape, and its twin with a mixture beside it. `said` is told what is being measured."""
    shapes = [shape, shape.mixture()] if with_mixture else [shape]
    not_measured: dict[str, dict[str, str]] = {each.name: {} for each in shapes}
    racing: dict[tuple[str, str], Contender] = {}
    is_peer: dict[str, bool] = {}
    n_threads = torch.get_num_threads()
    for each in shapes:
        own = list(ways.contenders(each, device))
        if each.config.use_moe:
            own.append((LOOP_OVER_EXPERTS, functools.partial(ways.loop_over_experts, each, device)))
        others = peers.contenders(each, device, with_transformers=with_transformers, nanogpt_checkout=nanogpt)
        for who, build, peer in [*((*one, False) for one in own), *((*one, True) for one in others)]:
            said(f"{each.name}, {who}: first steps")
            is_peer[who] = peer
            try:
                racing[each.name, who] = warmed_up(build)
            except (NotMeasured, ImportError, RuntimeError) as error:  # what torch.compile raises is a RuntimeError
                not_measured[each.name][who] = _first_line(error)
            finally:
                torch.set_num_threads(n_threads)
    seconds = race(racing, device, turns, steps, said)
    figures = []
    for each in shapes:
        mine = {who: contender for (name, who), contender in racing.items() if name == each.name}
        said(f"{each.name}: limit")
        limits = {
            precision: limit.measure(each, precision, device)
            for precision in dict.fromkeys(contender.precision for contender in mine.values())
        }
        measured = [
            _measured(each, who, contender, is_peer, seconds, limits[contender.precision])
            for who, contender in mine.items()
        ]
        figures.append(
            StepFigures(
                shape=each.name,
                machine=machine.name(device),
                vocab_size=each.vocab_size,
                n_windows=each.n_windows,
                length=each.length,
                n_params=each.n_params,
                n_active_params=each.n_active_params,
                dropout=each.config.dropout,
                n_steps=_WARM_UP + turns * steps,
                flops_per_step=each.flops,
                measured=measured,
                limits=limits,
                limit_seconds={precision: one.seconds for precision, one in limits.items()},
                not_measured=not_measured[each.name],
            )
        )
    return figures


def warmed_up(build: Callable[[], Contender]) -> Contender:
    """A contender that has done its first steps; this process is left with its number of threads."""
    contender = build()
    torch.set_num_threads(contender.n_threads)
    for _ in range(_WARM_UP):
        contender.step()
    return contender


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def race(
    racing: Mapping[Key, Contender],
    device: torch.device,
    turns: int,
    steps: int,
    said: Callable[[str], None],
) -> dict[Key, list[float]]:
    """Seconds of a step, of each contender in each turn of `steps` steps."""
    seconds: dict[Key, list[float]] = {key: [] for key in racing}
    n_threads = torch.get_num_threads()
    try:
        for turn in range(turns):
            said(f"turn {turn + 1} of {turns}")
            for key, contender in racing.items():
                torch.set_num_threads(contender.n_threads)
                seconds[key].append(step_seconds(contender, device, steps))
    finally:
        torch.set_num_threads(n_threads)
    return seconds


def step_seconds(contender: Contender, device: torch.device, steps: int) -> float:
    """Seconds of a step, as the mean of `steps` of them; a GPU has done all of them."""
    machine.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        contender.step()
    machine.synchronize(device)
    return (time.perf_counter() - began) / steps


def _measured(
    shape: Shape,
    who: str,
    contender: Contender,
    is_peer: dict[str, bool],
    seconds: dict[tuple[str, str], list[float]],
    least: Limit,
) -> Measured:
    mine = seconds[shape.name, who]
    median = statistics.median(mine)
    dense = seconds.get((shape.name.removesuffix("-mixture"), "eager" if who == LOOP_OVER_EXPERTS else who))
    return Measured(
        who=who,
        is_peer=is_peer[who],
        precision=contender.precision,
        n_threads=contender.n_threads,
        seconds=median,
        tok_per_sec=shape.n_tokens / median,
        loss=contender.loss(),
        mfu=shape.flops / median / least.peak_flops_per_sec,
        over_limit=median / least.seconds,
        times_as_fast_as={
            peer: _median_ratio(theirs, mine)
            for (name, peer), theirs in seconds.items()
            if name == shape.name and is_peer[peer] and peer != who
        },
        over_dense=_median_ratio(mine, dense) if shape.config.use_moe and dense is not None else None,
    )


def _median_ratio(numerators: Sequence[float], denominators: Iterable[float]) -> float:
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))
