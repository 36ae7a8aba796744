"""What an execution is: everything beside the config and the text that decides the bits of a result.

Decided at a job's first start, kept with it, and used again by every later attempt; equal executions give equal bytes.
Only the micro-batch changes later, when the memory does not hold it.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch

from nanomoe.config import JobConfig, Strict
from nanomoe.errors import NanomoeError
from nanomoe.model.moe import ExpertPath, choose_expert_path
from nanomoe.plan import n_windows
from nanomoe.training.steps.choice import StepPath, choose_path, compiled_for

_MOST_THREADS = torch.get_num_threads()
"""Threads that torch takes before a job has said otherwise: a process may train many."""

NUMERICS = 2
"""The number of our own arithmetic: initial weights, dropout, steps, loops. Raised with every change of bits."""


class DeviceUnavailable(NanomoeError, RuntimeError):
    """The device that was asked for, or that an earlier attempt used, is not there."""

    code = "device_unavailable"


class Execution(Strict):
    """How a job is computed."""

    device: Literal["cpu", "cuda"]
    """Kind of device."""

    device_name: str
    """Model of the GPU; on a CPU its instruction set decides, so this is `cpu`."""

    precision: Literal["float32", "bfloat16"]
    """Type of activations and matrix products; weights and optimizer are float32."""

    n_threads: int
    """Threads that share a fused step, or an operation elsewhere on a CPU: different counts give different bits."""

    instruction_set: str
    """What torch dispatches its CPU kernels to, for example AVX512."""

    path: StepPath
    """How a step is done: `eager`, operator by operator; `fused`, on a CPU, written out in compiled loops; or
    `captured`, on a GPU, the operators of `eager` as CUDA graphs."""

    path_reason: str | None = None
    """Why this path, in words; it decides nothing."""

    compiled_for: str | None = None
    """Compiler and processor of the loops that the path has; null where it has none."""

    numerics: int = 0
    """Number of the program's own arithmetic, raised whenever the same seed gives other bits."""

    expert_path: ExpertPath | None
    """How an eager or captured step computes experts; null without a mixture of experts, and where the step is fused:
    that multiplies the rows of each expert by themselves."""

    expert_path_reason: str | None = None
    """Why this path, in words; it decides nothing."""

    deterministic: bool
    """Whether every operator must be deterministic: always so on a CPU."""

    micro_batch: int
    """Windows computed together: the config's batch_size, or fewer once memory has run out."""

    torch_version: str
    """The library that computed it."""

    @classmethod
    def decide(
        cls,
        config: JobConfig,
        device: str,
        *,
        n_tokens: int,
        vocab_size: int | None = None,
        path: StepPath | None = None,
    ) -> Self:
        """The execution of a job that starts now on `device` (`auto`, `cpu`, `cuda` or `cuda:N`).

        `n_tokens` is the length of the text: with the batch size it decides how experts are computed. `path` is for
        whoever compares ways of doing a step: it is taken where it covers the job. With `vocab_size`, a fused step has
        the number of threads with which it is faster, measured where it is not known yet; else as many as torch uses.

        Raises:
            DeviceUnavailable: a GPU was asked for and there is none.
        """
        chosen = find_device(device)
        on_gpu = chosen.type == "cuda"
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        chosen_path, path_reason = choose_path(chosen, path)
        expert_path: ExpertPath | None = None
        reason: str | None = None
        if config.use_moe and chosen_path != "fused":
            windows = min(config.batch_size, n_windows(n_tokens, config.block_size))
            rows = windows * min(n_tokens, config.block_size)
            expert_path, reason = choose_expert_path(config, rows, chosen, dtype)
        n_threads = _MOST_THREADS
        if chosen_path == "fused" and vocab_size is not None:
            from nanomoe.training.steps.threads import measured_threads

            n_threads = measured_threads(config, vocab_size, n_tokens, dtype, _MOST_THREADS)
        return cls(
            device="cuda" if on_gpu else "cpu",
            device_name=torch.cuda.get_device_name(chosen) if on_gpu else "cpu",
            precision=precision,
            n_threads=n_threads,
            instruction_set=torch.backends.cpu.get_cpu_capability(),
            path=chosen_path,
            path_reason=path_reason,
            compiled_for=compiled_for(chosen_path),
            numerics=NUMERICS,
            expert_path=expert_path,
            expert_path_reason=reason,
            deterministic=config.deterministic or not on_gpu,
            micro_batch=config.batch_size,
            torch_version=torch.__version__,
        )

    @classmethod
    def recorded(cls, stored: Mapping[str, Any], config: JobConfig) -> Self:
        """The execution in a job's row. A job that began before the micro-batch was part of it had the config's."""
        return cls.model_validate({"micro_batch": config.batch_size} | dict(stored))

    def keeping(self, first: Self) -> Self:
        """What was decided at the job's first start, as far as the machine that this was decided on can do it too.

        Where the loops of a fused step are not compiled yet, this attempt does without them.
        """
        if first.device != self.device:
            return self.model_copy(update={"micro_batch": first.micro_batch})
        kept = ["precision", "n_threads", "deterministic", "micro_batch"]
        if first.path == "eager":
            kept += ["path", "path_reason", "compiled_for"]
        if first.path in ("eager", self.path):
            kept += ["expert_path", "expert_path_reason"]
        return self.model_copy(update={name: getattr(first, name) for name in kept})

    def apply(self) -> None:
        """Make this process compute so."""
        torch.set_num_threads(self.n_threads)
        if self.deterministic and self.device == "cuda":
            # cuBLAS reads it when its handle is made, which the first product on the device does.
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)

    def differences(self, other: Self) -> list[str]:
        """The fields in which `other` computes something else, as `field: this -> other`."""
        words = {"path_reason", "expert_path_reason"}
        mine, theirs = self.model_dump(exclude=words), other.model_dump(exclude=words)
        return [f"{field}: {mine[field]} -> {theirs[field]}" for field in mine if mine[field] != theirs[field]]


def find_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none.

    Raises:
        DeviceUnavailable: a GPU was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"{device} was asked for; this machine shows {torch.cuda.device_count()} CUDA devices")
    return chosen
