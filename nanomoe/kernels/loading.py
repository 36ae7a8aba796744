"""All loops at once, so that no call of one has to wait for the compiler later."""

import time

from nanomoe import kernels
from nanomoe.config import ModelConfig
from nanomoe.generate import Engine, Request
from nanomoe.model.gpt import GPT
from nanomoe.sampling import Sampling


def load_all() -> float:
    """Have every loop compiled for this processor, or read from where numba keeps it; returns the seconds it took."""
    began = time.monotonic()
    config = ModelConfig(block_size=8, n_layer=1, n_head=1, n_embd=128)
    model = GPT.build(config, 16_384)  # large enough to be read in 8 bits
    model.init_weights(0)
    engine = Engine(model.state_dict(), config, compiled=True)
    engine.run([Request([1], 2, sampling) for sampling in (Sampling(0), Sampling(1.0), Sampling(1.0, top_p=0.5))])
    kernels.mark_compiled()
    return time.monotonic() - began
