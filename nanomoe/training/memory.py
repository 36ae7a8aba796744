"""How memory that ran out is told from other errors."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory: on a GPU it has a class for that, on a CPU only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
