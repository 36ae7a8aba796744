"""Which way of doing a step a job takes."""

import os
from typing import Literal, get_args

import torch

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.step import TrainingStep

StepPath = Literal["eager", "fused"]

_FORCED = "NANOMOE_STEP_PATH"
"""For tests and measurements: the way that every job takes whose device it covers."""


def choose_path(device: torch.device, wanted: StepPath | None = None) -> tuple[StepPath, str]:
    """The way in which a job does its steps that starts now on `device`, and the reason in words.

    `wanted`: that way, if it covers the device, whether or not its loops have been compiled.

    Raises:
        ValueError: the way that the environment asks for does not exist.
    """
    if device.type != "cpu":
        return "eager", "the fused step is written for a CPU"
    asked = os.environ.get(_FORCED)
    for path in get_args(StepPath):
        if path == (wanted or asked):
            return path, "asked for"
    if asked:
        raise ValueError(f"{_FORCED} is {asked!r}; it can be {' or '.join(get_args(StepPath))}")
    from nanomoe.training.steps.loops.compiling import LOOPS  # numba, which takes a third of a second to import

    if not LOOPS.are_compiled():
        return "eager", "the loops of the fused step are not compiled for this processor yet"
    return "fused", "on a CPU"


def compiled_for(path: StepPath) -> str | None:
    """The compiler and the processor that decide how this way rounds, where it has loops of its own."""
    if path == "eager":
        return None
    from nanomoe import compiling

    return compiling.compiled_for()


def build_step(
    path: StepPath, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype
) -> TrainingStep:
    """That way of doing the steps of a job, for this model and this text."""
    if path == "eager":
        return EagerStep(model, windows, config, activations)
    from nanomoe.training.steps.fused import FusedStep

    return FusedStep(model, windows, config, activations)
