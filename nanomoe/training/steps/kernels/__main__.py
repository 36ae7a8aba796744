"""`python -m nanomoe.training.steps.kernels PARENT DEVICE LENGTH DTYPE CONFIG`: compile the kernels of such a job."""

import os
import sys

import torch

from nanomoe.config import JobConfig
from nanomoe.processes import die_with_parent
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.execution import Execution, find_device
from nanomoe.training.run import Run
from nanomoe.training.steps.kernels.compiling import KernelVariant

_LOWEST_PRIORITY = 19


def compile_kernels(config: JobConfig, device: str, length: int, dtype: str) -> None:
    """Do one step of a small model whose kernels are those of a job of this config, and note that they are compiled.

    Its text is one window of `length` bytes, and it has as few layers as show one of each kind.
    """
    fewer = {"tokenizer": "bytes", "batch_size": 1, "gradient_accumulation_steps": 1, "precision": dtype}
    small = config.model_copy(update=fewer | {"n_layer": config.moe_stride if config.use_moe else 1, "epochs": 1})
    tokenizer, chosen = load_tokenizer("bytes"), find_device(device)
    execution = Execution.decide(small, device, n_tokens=length, path="triton")
    Run(small, tokenizer.encode("x" * length), tokenizer, execution, device=chosen).train_step()
    KernelVariant(config, length, getattr(torch, dtype), execution.device_name).mark_compiled()


if __name__ == "__main__":
    parent, device, length, dtype, config = sys.argv[1:]
    os.nice(_LOWEST_PRIORITY)
    die_with_parent(int(parent))
    compile_kernels(JobConfig.model_validate_json(config), device, int(length), dtype)
