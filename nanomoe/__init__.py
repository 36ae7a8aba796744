"""nanomoe: very small language models (nanoGPT, nanoMoE), their training, evaluation and generation.

Knows no job, no HTTP and no database. Importing the package, or `nanomoe.config`, loads no torch.
"""

import os

__version__ = "0.1.0"

# Threads that wait for each other at the end of an operator should sleep soon, not spin. libgomp spins for
# milliseconds, which on a machine that does anything else are taken from the others. Measured on two cores: at a load
# of 10 a step of the reference job took over 2 s so, and 64 ms with this; on the idle machine 20 and 25 ms. Who trains
# on a machine of its own may set it to 1000000. libgomp reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
