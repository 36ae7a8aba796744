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
from nanomoe.training.memory import Cut, cut_to_fit, usable_bytes
from nanomoe.training.steps.choice import StepPath, choose_path, compiled_for
from nanomoe.training.steps.kernels.compiling import KernelVariant

_KEEPS_ACTIVATIONS: dict[StepPath, StepPath] = {"fused": "eager", "triton": "captured", "stacked": "captured"}
"""Ways that compute no activation again, and what is taken in their place where a job has to."""

_MOST_THREADS = torch.get_num_threads()
"""Threads that torch takes before a job has said otherwise: a process may train many."""

NUMERICS = 4
"""The number of our own arithmetic: initial weights, dropout, steps, evaluations, loops. Raised with every change of
bits."""


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
    """How a step is done: `eager`, operator by operator; `fused`, on a CPU, written out in compiled loops; `captured`,
    on a GPU, the operators of `eager` as CUDA graphs; `triton`, captured too, with kernels between the products; or
    `stacked`, captured too, with the weights of several jobs' models in one program."""

    path_reason: str | None = None
    """Why this path, in words; it decides nothing."""

    width: int | None = None
    """Models that a `stacked` program has, idle ones among them: on a GPU their number decides how products round. Null
    elsewhere."""

    compiled_for: str | None = None
    """Compiler of the loops or kernels that the path has, and the loops' processor or the kernels' sources; null where
    it has none."""

    numerics: int = 0
    """Number of the program's own arithmetic, raised whenever the same seed gives other bits."""

    expert_path: ExpertPath | None
    """How a step computes experts operator by operator; null without a mixture of experts, and where the step is fused:
    that multiplies the rows of each expert by themselves."""

    expert_path_reason: str | None = None
    """Why this path, in words; it decides nothing."""

    deterministic: bool
    """Whether every operator must be deterministic: always so on a CPU."""

    micro_batch: int
    """Windows computed together: the config's batch_size, or fewer where these do not fit the memory."""

    recomputes_activations: bool = False
    """Whether the backward pass computes each block again instead of keeping its activations: so where the memory holds
    not even one window's. The gradients are the same."""

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
        n_threads: int | None = None,
        width: int | None = None,
    ) -> Self:
        """The execution of a job that starts now on `device` (`auto`, `cpu`, `cuda` or `cuda:N`).

        `n_tokens` is the length of the text: with the batch size it decides how experts are computed. `path` is for
        whoever compares ways of doing a step: it is taken where it covers the job. With `vocab_size`, the job is cut to
        what the device's memory holds, and a fused step has the number of threads with which it is faster, measured
        where it is not known yet, unless `n_threads` gives it; else as many as torch uses. `width`: models that a
        stacked program has.

        Raises:
            DeviceUnavailable: a GPU was asked for and there is none.
        """
        chosen = find_device(device)
        on_gpu = chosen.type == "cuda"
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        device_name = torch.cuda.get_device_name(chosen) if on_gpu else "cpu"
        kernels = KernelVariant(config, min(n_tokens, config.block_size), dtype, device_name)
        chosen_path, path_reason = choose_path(chosen, path, kernels)
        cut = Cut(config.batch_size, recomputes=False)
        if vocab_size is not None:
            memory_path = "captured" if chosen_path == "stacked" else chosen_path  # a model's share is what it is alone
            cut = cut_to_fit(
                config, vocab_size, n_tokens, memory_path, usable_bytes(chosen), activation_bytes=dtype.itemsize
            )
            if cut.recomputes and chosen_path in _KEEPS_ACTIVATIONS:
                path_reason = f"the memory does not hold the activations that a {chosen_path} step keeps"
                chosen_path = _KEEPS_ACTIVATIONS[chosen_path]
        expert_path: ExpertPath | None = None
        reason: str | None = None
        if config.use_moe and chosen_path == "stacked":
            expert_path, reason = "masked", "in a stacked program every expert takes every token"
        elif config.use_moe and chosen_path != "fused":
            windows = min(cut.micro_batch, n_windows(n_tokens, config.block_size))
            rows = windows * min(n_tokens, config.block_size)
            expert_path, reason = choose_expert_path(config, rows, chosen, dtype)
        if n_threads is None and chosen_path == "fused" and vocab_size is not None:
            from nanomoe.training.steps.threads import measured_threads

            n_threads = measured_threads(config, vocab_size, n_tokens, dtype, _MOST_THREADS)
        return cls(
            device="cuda" if on_gpu else "cpu",
            device_name=device_name,
            precision=precision,
            n_threads=n_threads or _MOST_THREADS,
            instruction_set=torch.backends.cpu.get_cpu_capability(),
            path=chosen_path,
            path_reason=path_reason,
            width=width if chosen_path == "stacked" else None,
            compiled_for=compiled_for(chosen_path),
            numerics=NUMERICS,
            expert_path=expert_path,
            expert_path_reason=reason,
            deterministic=config.deterministic or not on_gpu,
            micro_batch=cut.micro_batch,
            recomputes_activations=cut.recomputes,
            torch_version=torch.__version__,
        )

    @classmethod
    def recorded(cls, stored: Mapping[str, Any], config: JobConfig) -> Self:
        """The execution in a job's row. A job that began before the micro-batch was part of it had the config's."""
        return cls.model_validate({"micro_batch": config.batch_size} | dict(stored))

    def keeping(self, first: Self) -> Self:
        """What was decided at the job's first start, as far as the machine that this was decided on can do it too.

        Where the loops of a fused step, or its kernels, are not compiled yet, this attempt does without them.
        """
        if first.device != self.device:
            return self.model_copy(update={"micro_batch": first.micro_batch})
        kept = ["precision", "n_threads", "deterministic", "micro_batch"]
        captured = ("captured", "triton", "stacked")
        is_plainer = first.path == "eager" or (first.path in ("captured", "stacked") and self.path in captured)
        if is_plainer:
            kept += ["path", "path_reason", "compiled_for", "width"]
        if is_plainer or first.path == self.path:
            kept += ["recomputes_activations", "expert_path", "expert_path_reason"]
        return self.model_copy(update={name: getattr(first, name) for name in kept})

    def kernels(self, config: JobConfig, n_tokens: int) -> KernelVariant:
        """Those that such a job has on this device, once they are compiled."""
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return KernelVariant(config, min(n_tokens, config.block_size), dtype, self.device_name)

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
