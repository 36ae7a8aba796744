"""The model: nanoGPT's block, its twin with a mixture of experts, and what they cost. Knows no training."""
