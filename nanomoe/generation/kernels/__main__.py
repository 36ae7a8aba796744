"""`python -m nanomoe.generation.kernels`: compile all loops for this processor, unless that was done before."""

import sys

from nanomoe.generation.kernels.loading import load_all

if __name__ == "__main__":
    print("compiling loops for this processor, once ...", file=sys.stderr, flush=True)
    print(f"done in {load_all():.0f} s", file=sys.stderr)
