"""Kernels of our own for what lies between the matrix products of a training step on a GPU, written in Triton.

Each file has a kernel, the operator of torch that launches it, and its reference: the same in plain operators of torch,
with which a test compares it. A launch is an operator so that whatever records or counts operators sees it.

Sums over rows are taken in a fixed order: every program adds up rows of its own, and the programs' sums are added up
afterwards. So equal inputs give equal bits.

Shape letters: B windows, T tokens of a window, N = B * T rows, C channels, H heads, D = C / H, F = 4 * C, V vocabulary.
"""
