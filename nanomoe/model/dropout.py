"""Dropout whose masks are a pure function of (seed, step, window, layer, site, head, row, column).

A resumed run needs no saved random state, a window's mask is the same in whatever micro-batch it travels, and a text
that grows by a token changes no number of another. A plane, the rows and columns of one head or of one expert's
output, has a 64-bit key, computed on the host by splitmix64. An element is a hash of its coordinates under that key:

    x = low word of the key + (row << 15 | column >> 1)
    x ^= x >> 16;  x *= 0x21f0aaad;  x ^= high word of the key
    x ^= x >> 15;  x *= 0x735a2d97;  x ^= x >> 15

in 32-bit unsigned arithmetic: the finaliser with two multiplications that Wellons' hash-prospector found to have the
least bias (https://github.com/skeeto/hash-prospector, issue 19), applied to a counter, with half of the key between its
rounds, so that two planes are not one sequence read from two places. A hash gives two draws of 16 bits: an even column
takes the low one. Loops that are compiled compute the same where they use it (`nanomoe.training.steps.loops`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanomoe.config import ModelConfig

_MASK64 = (1 << 64) - 1
_STREAM = 0x9E3779B97F4A7C15
EMBEDDING = -1
"""The `layer` of the mask after the embedding."""

FIRST_FACTOR = 0x21F0AAAD
"""The hash's first multiplier."""

SECOND_FACTOR = 0x735A2D97
"""The hash's second multiplier."""

ROW_SHIFT = 15
"""Bits of the counter that hold half a column's index: columns and rows are fewer than 65,536 each."""


class Site(IntEnum):
    """Where in a layer numbers are drawn."""

    ATTENTION_WEIGHTS = 0
    """A plane a head: rows are queries, columns keys."""
    ATTENTION_OUTPUT = 1
    """One plane: rows are tokens, columns channels. Also the site of the mask after the embedding."""
    MLP_OUTPUT = 2
    """One plane, or with a mixture of experts one for each of a token's choices, then for each shared expert."""
    ROUTER_NOISE = 3
    """One plane: rows are tokens, columns experts."""


def mix(*keys: int) -> int:
    """A 64-bit key from several integers, by splitmix64 (Steele, Lea, Flood 2014): neighbouring keys share nothing."""
    state = 0
    for key in keys:
        state = (state + key + _STREAM) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def _mixed(state: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One more key for every state of an array, as `mix` takes them."""
    state = state + key + np.uint64(_STREAM)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _mixed_on_device(state: Tensor, key: Tensor) -> Tensor:
    """The same in int64, as devices have it: products wrap around, and a shift to the right brings in the sign's bit,
    which is masked away."""
    state = state + key + _signed(_STREAM)
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def _signed(key: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return key - (key >> 63 << 64)


def window_keys(step: int, windows: Sequence[int], seed: int) -> list[int]:
    """`mix(seed, step, window)` of each window, as an int64 holds it."""
    return [_signed(mix(seed, step, window)) for window in windows]


def n_planes(config: ModelConfig) -> int:
    """The most planes that a site of this model has."""
    slots = config.k + config.n_shared_experts if config.use_moe else 1
    return max(config.n_head, slots)


def plane_keys(config: ModelConfig, step: int, windows: Sequence[int], seed: int) -> npt.NDArray[np.uint64]:
    """The key of every plane, `mix(seed, step, window, layer + 1, site, plane)`: (n_layer + 1, sites, windows, planes).

    The first is the embedding's.
    """
    of_window = np.array([mix(seed, step, window) for window in windows], dtype=np.uint64)
    layers, sites, planes = (np.arange(n, dtype=np.uint64) for n in (config.n_layer + 1, len(Site), n_planes(config)))
    keys = _mixed(of_window, layers[:, None])
    return _mixed(_mixed(keys[:, None], sites[:, None])[..., None], planes)


def plane_keys_on_device(config: ModelConfig, keys_B: Tensor) -> Tensor:
    """The same from the windows' keys, in int64 and without a look from the host."""
    layers, sites, planes = (
        torch.arange(n, device=keys_B.device) for n in (config.n_layer + 1, len(Site), n_planes(config))
    )
    keys = _mixed_on_device(keys_B, layers[:, None])
    return _mixed_on_device(_mixed_on_device(keys[:, None], sites[:, None])[..., None], planes)


def cut(p: float) -> int:
    """The draws of 65,536 that drop an element, of a dropout of `p`."""
    return round(p * 65_536)


def scale(p: float) -> float:
    """What a kept element is multiplied by, so that the mean stays."""
    return 65_536 / (65_536 - cut(p))


class Rate(NamedTuple):
    """How much is dropped: numbers, or tensors on the device where models of several rates are computed together."""

    cut: int | Tensor
    """How many of 65,536 draws drop an element."""
    scale: float | Tensor
    """What a kept element is multiplied by; float32 where it is a tensor."""

    @classmethod
    def of(cls, p: float) -> "Rate":
        """The rate of a dropout of `p`."""
        return cls(cut(p), scale(p))


class Dropout:
    """The dropout of one micro-batch: which windows it holds, at which step."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int,
        step: int,
        windows: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`config.dropout` is rounded to a multiple of 1/65,536, and the kept activations are scaled by that."""
        # One copy to the device for all layers and sites.
        keys = torch.from_numpy(plane_keys(config, step, windows, seed).view(np.int64)).to(device)
        self._set(Rate.of(config.dropout), lambda: keys, dtype, _kept_counters)

    @classmethod
    def of_window_keys(
        cls,
        config: ModelConfig,
        keys_B: Tensor,
        *,
        dtype: torch.dtype,
        counters: "Counters",
        planes: Tensor | None = None,
        rate: Rate | None = None,
    ) -> "Dropout":
        """The dropout of the windows whose `window_keys` lie on a device, int64: nothing is copied there or read back.

        `counters`: `new_counters`, or what keeps its results for as long as anything captured reads them. `planes`: the
        `plane_keys_on_device` of these windows, where they have been computed. `rate`: in place of the config's; at
        those sites that a model of the config drops at.
        """
        dropout = cls.__new__(cls)
        # Where nothing is drawn, no key is computed.
        keys = (lambda: plane_keys_on_device(config, keys_B)) if planes is None else (lambda: planes)
        dropout._set(rate or Rate.of(config.dropout), keys, dtype, counters)
        return dropout

    def _set(self, rate: Rate, keys: Callable[[], Tensor], dtype: torch.dtype, counters: "Counters") -> None:
        self._rate = rate
        self._dtype = dtype
        self._counters = counters
        self._keys = keys

    @functools.cached_property
    def _words(self) -> Tensor:
        """(layers, sites, B, planes, 2): low word and high word, as all processors that torch runs on store them."""
        words: Tensor = self._keys().view(torch.int32).unflatten(-1, (-1, 2))
        return words

    def mask(self, layer: int, site: Site, n_planes: int, n_rows: int, n_columns: int) -> Tensor:
        """The mask (B, planes, rows, columns) of a site: 0 where dropped, 1 / (1 - p) where kept."""
        bits = self._hash(layer, site, n_planes, n_rows, -(-n_columns // 2)).view(torch.int16)[..., :n_columns]
        return (bits >= self._rate.cut - 32_768).to(self._dtype).mul_(self._rate.scale)

    def noise(self, layer: int, n_tokens: int, n_columns: int) -> Tensor:
        """Standard normal noise (B, n_tokens, n_columns) for the router of one layer, by Box and Muller's formula."""
        bits = self._hash(layer, Site.ROUTER_NOISE, 1, n_tokens, 2 * n_columns).view(-1, n_tokens, n_columns, 2)
        # Two uniforms of 32 bits, neither 0; float64, so that devices differ in the last bit of a few numbers at most.
        uniforms = (bits.double() + (2**31 + 0.5)) / 2**32
        radius, angle = (-2 * uniforms[..., 0].log()).sqrt(), (2 * math.pi) * uniforms[..., 1]
        return (radius * angle.cos()).to(self._dtype)

    def _hash(self, layer: int, site: Site, n_planes: int, n_rows: int, n_words: int) -> Tensor:
        """The hashes (B, planes, rows, words), int32: products of 32-bit integers wrap around on every device."""
        low, high = self._words[layer + 1, site, :, :n_planes, None, None].unbind(-1)
        x: Tensor = self._counters(n_rows, n_words, low.device) + low
        x ^= (x >> 16) & 0xFFFF
        x *= FIRST_FACTOR
        x ^= high
        x ^= (x >> 15) & 0x1FFFF
        x *= SECOND_FACTOR
        x ^= (x >> 15) & 0x1FFFF
        return x


Counters = Callable[[int, int, torch.device], Tensor]
"""From a number of rows, one of words and a device to what is hashed there, (rows, words), int32."""


def new_counters(n_rows: int, n_words: int, device: torch.device) -> Tensor:
    """What is hashed at each row and word, see `Counters`."""
    rows, words = (torch.arange(n, dtype=torch.int32, device=device) for n in (n_rows, n_words))
    return (rows[:, None] << ROW_SHIFT) + words


_kept_counters = functools.lru_cache(maxsize=8)(new_counters)


class LayerDropout:
    """The dropout of one layer."""

    def __init__(self, dropout: Dropout, layer: int) -> None:
        self._dropout = dropout
        self._layer = layer

    def weights(self, weights_BHTT: Tensor) -> Tensor:
        """Attention weights, some of them dropped."""
        return weights_BHTT * self._dropout.mask(self._layer, Site.ATTENTION_WEIGHTS, *weights_BHTT.shape[1:])

    def output(self, site: Site, y_BTC: Tensor) -> Tensor:
        """A residual branch's output, some of its channels dropped."""
        return y_BTC * self._dropout.mask(self._layer, site, 1, *y_BTC.shape[1:])[:, 0]

    def of_experts(self, n_tokens: int, n_slots: int, n_embd: int) -> Tensor:
        """The mask (B, T, slots, C) of the outputs of a token's experts."""
        return self._dropout.mask(self._layer, Site.MLP_OUTPUT, n_slots, n_tokens, n_embd).transpose(1, 2)
