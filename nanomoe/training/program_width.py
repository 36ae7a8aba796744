"""How many runs of one shape are trained as one program on a GPU: measured once, and kept on the disk.

First two models that are trained as one program must have the losses that each has alone: a device on which company
changes them gets no programs. Then a stacked program of 1, 2, 4 and so on models of the reference run's shape is
captured and timed until twice as many models shorten a model-step by less than a tenth. All of it is done in a process
of its own: the trainer that asks touches no GPU before it has a job, and what goes wrong while measuring is gone with
the process. Whether so many models of a job's own shape fit the memory is arithmetic on that shape, done where jobs are
claimed.
"""

import argparse
import logging
import math
import os
import subprocess
import sys
import time

import torch

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.gpt import GPT
from nanomoe.processes import die_with_parent
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.cohort import stack
from nanomoe.training.cohort_width import number_that_pays
from nanomoe.training.measured_once import measured_once
from nanomoe.training.memory import is_out_of_memory
from nanomoe.training.run import Run, prepare
from nanomoe.training.steps.choice import CAPTURING, StepPath
from nanomoe.training.steps.stacked import Lane, StackedSteps
from nanomoe.training.steps.step import CaptureFailed

log = logging.getLogger(__name__)

MOST_MODELS = 128
"""No program is made wider, whatever pays: a cohort has one trainer, and all of its jobs fail together where that
dies. Assumed."""

_MOST_SECONDS = 10.0
"""After which no wider program is measured. A capture took 0.2 to 2.4 s on an H200 (measured)."""

_PATIENCE = 120.0
"""Seconds that the measuring process may take, the start of torch and of the device among them, before it is ended."""

_WARM_UPS, _STEPS = 2, 10

_CONFIG = JobConfig(block_size=87)
_VOCAB_SIZE = 8192
"""The reference run's shape: one window of 87 tokens."""

_CHECKED = JobConfig(
    tokenizer="bytes", block_size=32, batch_size=4, n_layer=2, n_head=2, n_embd=64, lr=5e-3, precision="float32"
)
_CHECKED_TEXT = "Era uma vez um pequeno modelo que aprendia a ler. " * 3
_CHECKED_STEPS = 10
_MOST_DIFFERENCE = 1e-4
"""Relative, of a loss in these steps: ten times the rounding that was seen on the stand-in for a GPU (measured)."""


class LossesDiffer(Exception):
    """Models have other losses in a program than alone."""


def measured_program_width(device_model: str) -> int | None:
    """Most members of a cohort on the GPU that torch calls `cuda` here, which has this name; 1 where company gains
    nothing, and None where that could not be measured, of which the log says why. Takes some 15 seconds (assumed), and
    only the first time that such a GPU is seen with this version of torch."""
    try:
        return measured_once("program", (device_model,), _measure_elsewhere)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        log.warning("cohort_not_measured: %s\n%s", error, said)
        return None


def _measure_elsewhere() -> int:
    command = [sys.executable, "-m", __name__, "--parent", str(os.getpid())]
    ended = subprocess.run(  # noqa: S603 - ourselves
        command, capture_output=True, text=True, timeout=_PATIENCE, check=True
    )
    return int(ended.stdout)


def measure(device: torch.device, most: int = MOST_MODELS) -> int:
    """One, two, four and so on, `most` at most: the number of models that a double of gains nothing more, or does not
    fit the memory, or would take too long to measure.

    Raises:
        CaptureFailed: steps cannot be captured on this device.
        LossesDiffer: in company, models learn something else there.
        RuntimeError: memory does not suffice for one model.
    """
    check_losses(device)
    ends = time.monotonic() + _MOST_SECONDS

    def seconds(width: int) -> float:
        try:
            return _seconds(device, width)
        except RuntimeError as error:
            if width == 1 or not is_out_of_memory(error):
                raise
            return math.inf

    return number_that_pays(seconds, most, may_go_on=lambda: time.monotonic() < ends)


def check_losses(device: torch.device) -> None:
    """Compare the losses of two models that are trained as one program with those that each has alone.

    Raises:
        CaptureFailed, LossesDiffer, RuntimeError: see `measure`.
    """
    configs = [_CHECKED.model_copy(update={"seed": seed, "dropout": 0.2 * seed}) for seed in (1, 2)]
    together = [_prepare(config, device, len(configs)) for config in configs]
    stack(together, len(configs))
    lanes = [run.step for run in together if isinstance(run.step, Lane)]
    if len(lanes) < len(together):
        raise CaptureFailed("; ".join(warning.message for run in together for warning in run.warnings))
    alone = [_prepare(config, device, None) for config in configs]
    for step in range(_CHECKED_STEPS):
        in_company = [run.train_step()[0] for run in together]
        lanes[0].program.advance()
        for config, ours, run in zip(configs, in_company, alone, strict=True):
            reference = run.train_step()[0].item()
            if not abs(ours.item() - reference) <= _MOST_DIFFERENCE * reference:
                raise LossesDiffer(
                    f"step {step}, seed {config.seed}: a loss of {ours.item()} in company, {reference} alone"
                )


def _prepare(config: JobConfig, device: torch.device, width: int | None) -> Run:
    path: StepPath = "captured" if width is None else "stacked"
    tokenizer = load_tokenizer(config.tokenizer)
    return prepare(config, _CHECKED_TEXT, tokenizer, device=str(device), path=path, width=width, n_threads=1).run


def _seconds(device: torch.device, width: int) -> float:
    """Seconds of a model's step in a program of so many models."""
    model = GPT.build(_CONFIG, _VOCAB_SIZE, device)
    model.init_weights(_CONFIG.seed)
    windows = Windows(torch.arange(_CONFIG.block_size, device=device) % _VOCAB_SIZE, _CONFIG.block_size)
    on_gpu = device.type == "cuda"
    is_narrow = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    graphs = CAPTURING[device.type](device)
    activations = torch.bfloat16 if is_narrow else torch.float32
    # One model stands for all: each row of weights is a copy of its own.
    program = StackedSteps([(model, windows, _CONFIG)] * width, activations, graphs)
    began = 0.0
    for n in range(_WARM_UPS + _STEPS):
        if n == _WARM_UPS:
            _wait_for(device)
            began = time.perf_counter()
        for lane in program.lanes:
            lane.begin()
            lane.add(n, [0], windows.n_targets([0]))
            lane.update()
        program.advance()
    _wait_for(device)
    return (time.perf_counter() - began) / (_STEPS * width)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="Started by a trainer.")
    parser.add_argument("--parent", type=int, required=True, help="process id of the trainer")
    die_with_parent(parser.parse_args().parent)
    print(measure(torch.device("cuda")))
