"""Which way of doing a step a job takes."""

import functools
import os
from collections.abc import Callable
from typing import Literal

import torch

from nanomoe.config import JobConfig
from nanomoe.cuda_graphs import CudaGraphs, Graphs
from nanomoe.data import Windows
from nanomoe.evaluation.reader import PlainReader, Reader
from nanomoe.model.dropout import new_counters
from nanomoe.model.gpt import GPT
from nanomoe.training.steps.captured import CapturedStep
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.kernels.compiling import KernelVariant, not_installed_because
from nanomoe.training.steps.kernels.compiling import compiled_for as kernels_compiled_for
from nanomoe.training.steps.operators import Operators, PlainOperators
from nanomoe.training.steps.step import TrainingStep

StepPath = Literal["eager", "fused", "captured", "triton", "stacked"]

CAPTURING: dict[str, Callable[[torch.device], Graphs]] = {"cuda": CudaGraphs}
"""What captures the work of a device, by its kind. Tests add a stand-in for the CPU."""

_FORCED = "NANOMOE_STEP_PATH"
"""For tests and measurements: the way that every job takes whose device it covers."""


def not_captured_because(device: torch.device) -> str | None:
    """Why a step on this device is not captured; None when it is."""
    return None if device.type in CAPTURING else "only a GPU has graphs of captured work"


def choose_path(
    device: torch.device, wanted: StepPath | None = None, kernels: KernelVariant | None = None
) -> tuple[StepPath, str]:
    """The way in which a job does its steps that starts now on `device`, and the reason in words.

    `wanted`: that way, if it covers the device, whether or not its loops or kernels have been compiled. `kernels`:
    those of the job.

    Raises:
        ValueError: the way that the environment asks for does not exist.
    """
    not_captured = not_captured_because(device)
    refused: dict[StepPath, str | None] = {
        "eager": None,
        "fused": None if device.type == "cpu" else "the fused step is written for a CPU",
        "captured": not_captured,
        "triton": not_captured or not_installed_because(),
        "stacked": not_captured,
    }
    asked = wanted or os.environ.get(_FORCED)
    if asked and asked not in refused:
        raise ValueError(f"{_FORCED} is {asked!r}; it can be {' or '.join(refused)}")
    for path, reason in refused.items():
        if path == asked:
            next_best: StepPath = "captured" if path == "triton" and not_captured is None else "eager"
            return (path, "asked for") if reason is None else (next_best, reason)
    if device.type == "cuda":
        reason = "no kernels are known" if kernels is None else kernels.not_compiled_because()
        if reason is not None:
            return "captured", f"on a GPU a step is launched as a whole; {reason}"
        return "triton", "on a GPU a step is launched as a whole, with kernels between its matrix products"
    if reason := refused["fused"]:
        return "eager", reason
    from nanomoe.training.steps.loops.compiling import LOOPS  # numba, which takes a third of a second to import

    if not LOOPS.are_compiled():
        return "eager", "the loops of the fused step are not compiled for this processor yet"
    return "fused", "on a CPU"


def compiled_for(path: StepPath) -> str | None:
    """The compiler, and the processor or the kernels' sources, that decide how this way rounds, where it has loops or
    kernels of its own."""
    if path == "triton":
        return kernels_compiled_for()
    if path != "fused":
        return None
    from nanomoe import compiling

    return compiling.compiled_for()


def build_step(
    path: StepPath, model: GPT, windows: Windows, config: JobConfig, activations: torch.dtype
) -> TrainingStep:
    """That way of doing the steps of a job, for this model and this text."""
    if path in ("eager", "stacked"):  # until the run joins those that it is stacked with
        return EagerStep(model, windows, config, activations)
    if path in ("captured", "triton"):
        counters = functools.cache(new_counters)  # for as long as the graphs that read them
        operators: Operators
        if path == "triton":
            from nanomoe.training.steps.kernels.operators import KernelOperators

            operators = KernelOperators(model, windows, config, activations, counters)
        else:
            operators = PlainOperators(model, windows, config, activations, counters)
        graphs = CAPTURING[windows.device.type](windows.device)
        return CapturedStep(model, windows, config, operators, graphs)
    from nanomoe.training.steps.fused import FusedStep

    return FusedStep(model, windows, config, activations)


def build_reader(path: StepPath, model: GPT) -> Reader:
    """The way in which evaluations read, of a job whose steps are done in that way."""
    if path != "fused":
        return PlainReader(model)
    from nanomoe.training.steps.fused_reader import FusedReader

    return FusedReader(model)
