"""nanomoe: very small language models (nanoGPT, nanoMoE), their training, evaluation and generation.

Knows no job, no HTTP and no database. Importing the package, or `nanomoe.config`, loads no torch.
"""

__version__ = "0.1.0"
