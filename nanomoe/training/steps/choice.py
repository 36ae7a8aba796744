"""Which way of doing a step a job takes."""

import os
from collections.abc import Callable
from typing import Literal

import torch

from nanomoe.config import JobConfig
from nanomoe.cuda_graphs import CudaGraphs, Graphs
from nanomoe.data import Windows
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.captured import CapturedStep
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.step import TrainingStep

StepPath = Literal["eager", "fused", "captured"]

CAPTURING: dict[str, Callable[[torch.device], Graphs]] = {"cuda": CudaGraphs}
"""What captures the work of a device, by its kind. Tests add a stand-in for the CPU."""

_FORCED = "NANOMOE_STEP_PATH"
"""For tests and measurements: the way that every job takes whose device it covers."""


def not_captured_because(device: torch.device) -> str | None:
    """Why a step on this device is not captured; None when it is."""
    return None if device.type in CAPTURING else "only a GPU has graphs of captured work"


def choose_path(device: torch.device, wanted: StepPath | None = None) -> tuple[StepPath, str]:
    """The way in which a job does its steps that starts now on `device`, and the reason in words.

    `wanted`: that way, if it covers the device, whether or not its loops have been compiled.

    Raises:
        ValueError: the way that the environment asks for does not exist.
    """
    refused: dict[StepPath, str | None] = {
        "eager": None,
        "fused": None if device.type == "cpu" else "the fused step is written for a CPU",
        "captured": not_captured_because(device),
    }
    asked = wanted or os.environ.get(_FORCED)
    if asked and asked not in refused:
        raise ValueError(f"{_FORCED} is {asked!r}; it can be {' or '.join(refused)}")
    for path, reason in refused.items():
        if path == asked:
            return (path, "asked for") if reason is None else ("eager", reason)
    if device.type == "cuda":
        return "captured", "on a GPU a step is launched as a whole"
    if reason := refused["fused"]:
        return "eager", reason
    from nanomoe.training.steps.loops.compiling import LOOPS  # numba, which takes a third of a second to import

    if not LOOPS.are_compiled():
        return "eager", "the loops of the fused step are not compiled for this processor yet"
    return "fused", "on a CPU"


def compiled_for(path: StepPath) -> str | None:
    """The compiler and the processor that decide how this way rounds, where it has loops of its own."""
    if path != "fused":
        return None
    from nanomoe import compiling

    return compiling.compiled_for()


def build_step(
    path: StepPath, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype
) -> TrainingStep:
    """That way of doing the steps of a job, for this model and this text."""
    if path == "eager":
        return EagerStep(model, windows, config, activations)
    if path == "captured":
        graphs = CAPTURING[windows.device.type](windows.device)
        return CapturedStep(model, windows, config, activations, graphs)
    from nanomoe.training.steps.fused import FusedStep

    return FusedStep(model, windows, config, activations)
