"""The keys of the dropout's planes, as `nanomoe.model.dropout.plane_keys` computes them from arrays: in a loop."""

import numpy as np

from nanomoe.compiling import Array
from nanomoe.training.steps.loops.compiling import Keys, compiled

_STREAM = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@compiled
def _mixed(state: np.uint64, key: np.uint64) -> np.uint64:
    """One step of splitmix64."""
    state = np.uint64(state + key + _STREAM)
    state = np.uint64((state ^ (state >> _30)) * _FIRST)
    state = np.uint64((state ^ (state >> _27)) * _SECOND)
    return np.uint64(state ^ (state >> _31))


@compiled
def plane_keys(seed: np.uint64, step: np.uint64, windows: Array, keys: Keys) -> None:
    """Fill in low and high words: (layers and the embedding first, sites, windows, planes, 2)."""
    layers, sites, B, planes, _ = keys.shape
    for b in range(B):
        of_window = _mixed(_mixed(_mixed(np.uint64(0), seed), step), np.uint64(windows[b]))
        for layer in range(layers):
            of_layer = _mixed(of_window, np.uint64(layer))
            for site in range(sites):
                of_site = _mixed(of_layer, np.uint64(site))
                for plane in range(planes):
                    key = _mixed(of_site, np.uint64(plane))
                    keys[layer, site, b, plane, 0] = np.uint32(key & _LOW)
                    keys[layer, site, b, plane, 1] = np.uint32(key >> _32)
