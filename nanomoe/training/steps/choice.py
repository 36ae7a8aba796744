"""Which way of doing a step a job takes."""

import torch

from nanomoe.config import JobConfig
from nanomoe.data import Windows
from nanomoe.model.gpt import GPT
from nanomoe.training.execution import Execution
from nanomoe.training.steps.eager import EagerStep
from nanomoe.training.steps.step import TrainingStep


def build_step(execution: Execution, model: GPT, windows: Windows, config: JobConfig) -> TrainingStep:
    """The way that the execution names, for this model and this text."""
    activations = torch.bfloat16 if execution.precision == "bfloat16" else torch.float32
    return EagerStep(model, windows, config, activations)
