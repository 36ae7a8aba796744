"""`python -m nanomoe.kernels`: compile all loops for this processor, unless that was done before."""

import sys
import time

import torch

from nanomoe.config import ModelConfig
from nanomoe.generate import Engine, Request
from nanomoe.model import GPT
from nanomoe.sampling import Sampling


def warm_up() -> float:
    """Have every loop compiled, or read from where numba keeps it; how many seconds that took."""
    began = time.monotonic()
    config = ModelConfig(block_size=8, n_layer=1, n_head=1, n_embd=128)
    model = GPT.build(config, 16_384)  # large enough to be read in 8 bits
    model.init_weights(0)
    engine = Engine(model.state_dict(), config, compiled=True)
    engine.run([Request([1], 2, sampling) for sampling in (Sampling(0), Sampling(1.0), Sampling(1.0, top_p=0.5))])
    return time.monotonic() - began


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("compiling loops for this processor, once ...", file=sys.stderr, flush=True)
    print(f"done in {warm_up():.0f} s", file=sys.stderr)
