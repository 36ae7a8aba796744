"""Dropout whose masks are a pure function of (seed, step, window, layer).

A resumed run needs no saved random state, a window's mask is the same in whatever micro-batch it travels, and the
bits do not depend on the number of threads. `torch.bernoulli` draws one element at a time; here one 64-bit draw gives
four elements, each kept when its 16 bits reach a threshold.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
EMBEDDING = -1
"""The `layer` of the masks after the embedding."""


def mix(*keys: int) -> int:
    """A 64-bit key from several integers, by splitmix64 (Steele, Lea, Flood 2014): neighbouring keys share nothing."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


class LayerMasks:
    """The masks of one layer, cut in the order asked for from one draw per window."""

    def __init__(self, bits_BN: Tensor, threshold: int, scale: float, dtype: torch.dtype) -> None:
        self._bits_BN = bits_BN
        self._threshold = threshold
        self._scale = scale
        self._dtype = dtype
        self._used = 0

    def take(self, *shape: int) -> Tensor:
        """The next mask (B, *shape): 0 where dropped, 1 / (1 - p) where kept."""
        n = prod(shape)
        bits_BN = self._bits_BN[:, self._used : self._used + n]
        assert bits_BN.shape[1] == n, "a layer took more masks than it had asked for"
        self._used += n
        return (bits_BN >= self._threshold).to(self._dtype).mul_(self._scale).view(-1, *shape)


class Dropout:
    """The dropout of one micro-batch: which windows it holds, at which step."""

    def __init__(
        self, p: float, *, seed: int, step: int, windows: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        """`p` is rounded to a multiple of 1/65,536, and the kept activations are scaled by that rounded value."""
        self._cut = round(p * 65_536)
        self._keys = [mix(seed, step, window) for window in windows]
        self._generator = torch.Generator(device)
        self._device = device
        self._dtype = dtype

    def layer(self, layer: int, n_elements: int) -> LayerMasks:
        """Masks of `n_elements` elements a window in all, for one layer (`EMBEDDING` or a block's index)."""
        bits = torch.empty((len(self._keys), -(-n_elements // 4)), dtype=torch.int64, device=self._device)
        for row, key in zip(bits, self._keys, strict=True):
            row.random_(-(2**63), None, generator=self._generator.manual_seed(mix(key, layer + 1)))
        return LayerMasks(bits.view(torch.int16), self._cut - 32_768, 65_536 / (65_536 - self._cut), self._dtype)

    def noise(self, layer: int, n_tokens: int, n_columns: int) -> Tensor:
        """Standard normal noise (B, n_tokens, n_columns), for the router of one layer."""
        noise = torch.empty((len(self._keys), n_tokens, n_columns), dtype=self._dtype, device=self._device)
        for row, key in zip(noise, self._keys, strict=True):
            row.normal_(generator=self._generator.manual_seed(mix(key, layer + 1, 1)))
        return noise
