"""Dropout where it is used: the keys of all planes, and whether an element is kept, as `nanomoe.model.dropout` says."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.model import dropout
from nanomoe.model.dropout import Site, n_planes
from nanomoe.training.steps.kernels.launching import OPTIONS, operator

_STREAM: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB)
_FIRST_FACTOR: tl.constexpr = tl.constexpr(dropout.FIRST_FACTOR)
_SECOND_FACTOR: tl.constexpr = tl.constexpr(dropout.SECOND_FACTOR)
_ROW_SHIFT: tl.constexpr = tl.constexpr(dropout.ROW_SHIFT)
_BLOCK = 256


@triton.jit
def load_key(words, plane):
    """Low and high word of a plane's key; `words` points at those of the first plane."""
    low = tl.load(words + 2 * plane).to(tl.uint32, bitcast=True)
    high = tl.load(words + 2 * plane + 1).to(tl.uint32, bitcast=True)
    return low, high


@triton.jit
def kept(low, high, row, column, cut, scale):
    """What an element is multiplied by: 0 where its 16 bits, taken as a signed number, are among the `cut` least of
    65,536, else `scale`."""
    x = low + ((row.to(tl.uint32) << _ROW_SHIFT) | (column.to(tl.uint32) >> 1))
    x = (x ^ (x >> 16)) * _FIRST_FACTOR
    x = x ^ high
    x = (x ^ (x >> 15)) * _SECOND_FACTOR
    x = x ^ (x >> 15)
    draw = tl.where((column & 1) == 1, x >> 16, x & 0xFFFF) ^ 0x8000
    return tl.where(draw.to(tl.int32) >= cut, scale, 0.0)


@triton.jit
def _mixed(state, key):
    """One step of splitmix64."""
    state = state + key.to(tl.uint64) + _STREAM
    state = (state ^ (state >> 30)) * _FIRST
    state = (state ^ (state >> 27)) * _SECOND
    return state ^ (state >> 31)


@triton.jit(do_not_specialize=["n", "n_windows", "sites", "planes"])
def _plane_keys(keys_B, words, n, n_windows, sites, planes, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    plane, window = index % planes, index // planes % n_windows
    site = index // (planes * n_windows) % sites
    layer = index // (planes * n_windows * sites)
    key = tl.load(keys_B + window, mask=inside, other=0).to(tl.uint64, bitcast=True)
    key = _mixed(_mixed(_mixed(key, layer), site), plane)
    tl.store(words + index, key.to(tl.int64, bitcast=True), mask=inside)


@operator("plane_keys(Tensor keys_B, int layers, int sites, int planes) -> Tensor")
def _launch_plane_keys(keys_B: Tensor, layers: int, sites: int, planes: int) -> Tensor:
    keys = keys_B.new_empty(layers, sites, len(keys_B), planes)
    n = keys.numel()
    _plane_keys[(triton.cdiv(n, _BLOCK),)](keys_B, keys, n, len(keys_B), sites, planes, BLOCK=_BLOCK, **OPTIONS)
    return keys


def plane_keys(config: ModelConfig, keys_B: Tensor) -> Tensor:
    """The key of every plane, int64 (n_layer + 1, sites, B, planes), from the windows' keys; its reference is
    `nanomoe.model.dropout.plane_keys_on_device`."""
    keys: Tensor = _launch_plane_keys(keys_B, config.n_layer + 1, len(Site), n_planes(config))
    return keys


def words_of(keys: Tensor, layer: int, site: Site) -> Tensor:
    """The words of a site's planes, int32 (B, planes, 2), low word first; `layer` as in `Dropout.mask`."""
    words_BP2: Tensor = keys[layer + 1, site].view(torch.int32).unflatten(-1, (-1, 2))
    return words_BP2
