"""How much memory a device has, how a job is cut to fit it, and how memory that ran out is told from other errors."""

import os
from typing import NamedTuple

import torch

from nanomoe.config import JobConfig
from nanomoe.model.size import Way, training_bytes
from nanomoe.plan import OutOfMemory, Plan

_USABLE = 0.9
"""Share of a device's memory that a job may take: the rest is the process itself, or a GPU's context. Assumed."""


def usable_bytes(device: torch.device) -> int:
    """Bytes that a job may take on a device: a share of all that there are, so that equal machines decide alike."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_USABLE * total)


class Cut(NamedTuple):
    """How a job is computed so that it fits."""

    micro_batch: int
    """Windows computed together."""
    recomputes: bool
    """Whether activations are computed again in the backward pass."""


def cut_to_fit(
    config: JobConfig, vocab_size: int, n_tokens: int, way: Way, usable: int, *, activation_bytes: int
) -> Cut:
    """The largest micro-batch that is predicted to fit `usable` bytes; activations are computed again only where not
    even the smallest does.

    First the micro-batch, because it costs little: a step does the same products in more parts. To compute blocks again
    costs a third of them. A fused step keeps all activations; whoever is told to recompute takes another way. What
    does not fit at all is cut as far as it can be: the prediction may be wrong.
    """
    plan = Plan.of(config, n_tokens)

    def fits(cut: Cut) -> bool:
        needed = training_bytes(
            config, vocab_size, plan.n_train_tokens, way="eager" if cut.recomputes and way == "fused" else way,
            micro_batch=cut.micro_batch, recomputes=cut.recomputes, activation_bytes=activation_bytes,
        )  # fmt: skip
        return needed <= usable

    sizes = [config.batch_size]
    while True:
        try:
            sizes.append(plan.halved(sizes[-1], config))
        except OutOfMemory:
            break
    cuts = [Cut(size, recomputes) for recomputes in (False, True) for size in sizes]
    return next(filter(fits, cuts), cuts[-1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory: on a GPU it has a class for that, on a CPU only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
