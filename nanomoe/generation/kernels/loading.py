"""All loops at once, so that no call of one has to wait for the compiler later."""

import time

import numpy as np
import torch

from nanomoe.config import ModelConfig
from nanomoe.generation.kernels import compiling, short_list
from nanomoe.generation.kernels.step import Loops


def load_all() -> float:
    """Have every loop compiled for this processor, or read from where numba keeps it; returns the seconds it took."""
    began = time.monotonic()
    config = ModelConfig(block_size=8, n_layer=2, n_head=1, n_embd=32, use_moe=True)
    weights = {f"transformer.{name}.weight": torch.zeros(32, 32) for name in ("wte", "wpe")}
    hidden_1C = Loops({**weights, "transformer.ln_f.weight": torch.ones(32)}, config).step([(0, 0, [1])])
    embedding = short_list.Embedding(np.ones((64, 32), np.float32))
    embedding.logits(hidden_1C, 1)
    embedding.short_lists(hidden_1C, [1], 1)
    compiling.mark_compiled()
    return time.monotonic() - began
