"""`python -m nanomoe.kernels`: compile all loops for this processor, unless that was done before."""

import sys

import torch

from nanomoe.kernels.loading import load_all

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("compiling loops for this processor, once ...", file=sys.stderr, flush=True)
    print(f"done in {load_all():.0f} s", file=sys.stderr)
