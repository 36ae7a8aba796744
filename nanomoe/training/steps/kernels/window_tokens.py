"""Inputs and targets of windows whose numbers lie on the device; the reference is `nanomoe.data.Windows.gather`."""

import triton
import triton.language as tl
from torch import Tensor

from nanomoe.data import Windows
from nanomoe.training.steps.kernels.launching import OPTIONS, operator

_BLOCK = 256
_IGNORED: tl.constexpr = tl.constexpr(-1)


@triton.jit(do_not_specialize=["n_tokens", "T"], do_not_specialize_on_alignment=["windows_B"])
def _gather(tokens, windows_B, inputs_BT, targets_BT, n_tokens, T, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < T
    first = tl.load(windows_B + row) * T  # the first position that no earlier window covers
    position = tl.maximum(tl.minimum(first, n_tokens - 1 - T), 0) + t
    there = row.to(tl.int64) * T + t
    tl.store(inputs_BT + there, tl.load(tokens + position, mask=inside, other=0), mask=inside)
    target = tl.load(tokens + position + 1, mask=inside, other=0)
    tl.store(targets_BT + there, tl.where(position < first, _IGNORED, target), mask=inside)


@operator("window_tokens(Tensor tokens, Tensor windows_B, int T) -> (Tensor, Tensor)")
def _launch(tokens: Tensor, windows_B: Tensor, T: int) -> tuple[Tensor, Tensor]:
    inputs_BT, targets_BT = (tokens.new_empty(len(windows_B), T) for _ in range(2))
    grid = (triton.cdiv(T, _BLOCK), len(windows_B))
    _gather[grid](tokens, windows_B, inputs_BT, targets_BT, len(tokens) - 1, T, BLOCK=_BLOCK, **OPTIONS)
    return inputs_BT, targets_BT


def gather(windows: Windows, windows_B: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), int64, of windows whose numbers are given, int64."""
    inputs_BT, targets_BT = _launch(windows.padded_tokens, windows_B, windows.length)
    return inputs_BT, targets_BT
