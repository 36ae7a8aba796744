"""How the time per trained token grows with the length of windows, the width, the layers and the number of experts."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nanomoe.bench.training import ways
from nanomoe.bench.training.contender import Contender, NotMeasured
from nanomoe.bench.training.shapes import Shape
from nanomoe.bench.training.steps import race, warmed_up
from nanomoe.config import JobConfig

TOKENS = 1024
"""Tokens of every step, however long its windows are."""

_BASE: dict[str, Any] = {"tokenizer": "bytes", "block_size": 64}
"""4 layers, 4 heads, 128 channels, 16 windows of 64 bytes."""

_MIXTURE = {"use_moe": True, "k": 2, "expert_hidden_ratio": 2.0}

AXES: dict[str, dict[int, dict[str, Any]]] = {
    "length": {n: {"block_size": n} for n in (16, 64, 256, 1024)},
    "channels": {n: {"n_embd": n} for n in (32, 64, 128, 256, 512)},
    "layers": {n: {"n_layer": n} for n in (1, 2, 4, 8, 16)},
    "experts": {n: _MIXTURE | {"n_experts": n} for n in (2, 4, 8, 16, 32)},
}
"""What is changed of the base, by the axis and its value. Experts: two of them for each token, in every other layer."""


@dataclass(frozen=True)
class Point:
    """Time per token at one value of one axis."""

    axis: str
    """Which of `AXES`."""

    value: int
    """The value on the axis."""

    way: str
    """The program's way of doing the step."""

    seconds_per_token: float
    """Seconds of a step over its tokens: the median of the turns."""


def measure(
    device: torch.device,
    *,
    turns: int,
    steps: int,
    said: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Measure all points of an axis in alternating turns, axis after axis, in each way that covers them."""
    points = []
    n_threads = torch.get_num_threads()
    for axis, values in AXES.items():
        racing: dict[tuple[int, str], Contender] = {}
        for value, changes in values.items():
            said(f"{axis} {value}")
            for way, build in ways.contenders(_shape(f"{axis} {value}", changes), device):
                try:
                    racing[value, way] = warmed_up(build)
                except NotMeasured as reason:
                    said(f"{axis} {value}, {way}: {reason}")
                finally:
                    torch.set_num_threads(n_threads)
        seconds = race(racing, device, turns, steps, said)
        points += [
            Point(axis, value, way, statistics.median(taken) / TOKENS) for (value, way), taken in seconds.items()
        ]
    return points


def _shape(name: str, changes: Mapping[str, Any]) -> Shape:
    """A step of `TOKENS` tokens in one batch."""
    length = int((_BASE | dict(changes))["block_size"])
    config = JobConfig.model_validate(_BASE | {"batch_size": TOKENS // length} | dict(changes))
    return Shape(name, config, 256, n_windows=TOKENS // length, length=length)
