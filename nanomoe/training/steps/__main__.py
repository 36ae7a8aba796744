"""`python -m nanomoe.training.steps`: compile the loops of training for this processor, unless that was done before."""

import sys

import torch

from nanomoe.training.steps.loading import load_all
from nanomoe.training.steps.loops.compiling import LOOPS

if __name__ == "__main__":
    torch.set_num_threads(1)
    if not LOOPS.are_compiled():
        print("compiling the loops of training for this processor, once ...", file=sys.stderr, flush=True)
    print(f"loaded in {load_all():.0f} s", file=sys.stderr)
