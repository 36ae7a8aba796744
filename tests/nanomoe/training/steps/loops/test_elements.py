"""Each function of one element, in a loop over many, against tensor operations."""

import math

import numpy as np
import torch
from torch import Tensor

from nanomoe.compiling import Array, Floats
from nanomoe.config import ModelConfig
from nanomoe.model.dropout import Dropout, Site, cut, plane_keys, scale
from nanomoe.training.steps.loops import elements, keys
from nanomoe.training.steps.loops.compiling import Keys, compiled


@compiled
def every_function(x: Floats, exp: Floats, cdf: Floats, density: Floats, back: Floats) -> None:
    for row in range(x.shape[0]):
        for c in range(x.shape[1]):
            exp[row, c] = elements.exp(x[row, c])
            cdf[row, c] = elements.normal_cdf(x[row, c])
            density[row, c] = elements.normal_density(x[row, c])
            back[row, c] = elements.unordered(elements.ordered(x[row, c]))


@compiled
def copied(x: Array, copy: Array) -> None:
    for row in range(x.shape[0]):
        for c in range(x.shape[1]):
            elements.put(copy, row, c, elements.get(x, row, c))


@compiled
def all_kept(key: Keys, cut: np.uint32, scale: np.float32, mask: Floats) -> None:
    for row in range(mask.shape[0]):
        for c in range(mask.shape[1]):
            mask[row, c] = elements.kept(key[0], key[1], row, c, cut, scale)


def as_columns(numbers: Tensor) -> Floats:
    array: Floats = numbers.view(1, -1).numpy()
    return array


def test_exp_gelu_and_order_are_those_of_wider_numbers() -> None:
    x = torch.linspace(-86.9, 87.9, 100_001)
    exp, cdf, density, back = (np.empty((1, len(x)), np.float32) for _ in range(4))
    every_function(as_columns(x), exp, cdf, density, back)
    wide = x.double()
    torch.testing.assert_close(torch.from_numpy(exp)[0].double(), wide.exp(), rtol=2e-7, atol=0)
    torch.testing.assert_close(torch.from_numpy(cdf)[0].double(), torch.special.ndtr(wide), rtol=0, atol=2e-7)
    expected = (-wide.square() / 2).exp() / math.sqrt(2 * math.pi)
    torch.testing.assert_close(torch.from_numpy(density)[0].double(), expected, rtol=0, atol=1e-7)
    assert np.array_equal(back[0], x.numpy())


def test_what_is_not_a_number_stays_so_and_what_is_too_large_stays_large() -> None:
    x = torch.tensor([math.nan, 1000.0, -1000.0, math.inf])
    exp, cdf, density, back = (np.empty((1, 4), np.float32) for _ in range(4))
    every_function(as_columns(x), exp, cdf, density, back)
    assert np.isnan([exp[0, 0], cdf[0, 0], density[0, 0], back[0, 0]]).all()
    assert exp[0, 1] > 1e38
    assert exp[0, 2] < 1e-37
    assert back[0, 3] == math.inf


@compiled
def keys_in_order(x: Floats, order: Array) -> None:
    for c in range(x.shape[1]):
        order[c] = elements.ordered(x[0, c])


def test_integers_have_the_order_of_the_numbers() -> None:
    x = torch.tensor([-math.inf, -3.0, -1e-30, 0.0, 1e-30, 2.0, math.inf])
    order = np.empty(len(x), np.int32)
    keys_in_order(as_columns(x), order)
    assert (np.diff(order.astype(np.int64)) > 0).all()


def test_numbers_of_16_bits_are_rounded_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[x.isfinite()]
    narrow = torch.empty(1, len(x), dtype=torch.bfloat16)
    copied(as_columns(x), narrow.view(torch.uint16).numpy())
    assert torch.equal(narrow[0], x.bfloat16())
    wide = np.empty((1, len(x)), np.float32)
    copied(narrow.view(torch.uint16).numpy(), wide)
    assert torch.equal(torch.from_numpy(wide)[0], x.bfloat16().float())


def test_masks_are_those_of_the_tensor_operations_bit_for_bit() -> None:
    config = ModelConfig(dropout=0.3)
    dropout = Dropout(config, seed=2**63 - 1, step=9, windows=[4, 11], device=torch.device("cpu"), dtype=torch.float32)
    words = np.empty((config.n_layer + 1, len(Site), 2, config.n_head, 2), np.uint32)
    keys.plane_keys(np.uint64(2**63 - 1), np.uint64(9), np.array([4, 11]), words)
    expected = plane_keys(config, 9, [4, 11], 2**63 - 1)
    assert np.array_equal(words.view(np.uint64)[..., 0], expected)
    for layer, site, plane in ((-1, Site.ATTENTION_OUTPUT, 0), (0, Site.ATTENTION_WEIGHTS, 3), (3, Site.MLP_OUTPUT, 0)):
        mask = np.empty((101, 77), np.float32)
        all_kept(words[layer + 1, site, 1, plane], np.uint32(cut(0.3)), np.float32(scale(0.3)), mask)
        assert torch.equal(torch.from_numpy(mask), dropout.mask(layer, site, plane + 1, 101, 77)[1, plane])


def test_an_element_is_read_and_stored_from_python_as_in_a_loop() -> None:
    for array in (np.zeros((1, 2), np.float32), np.zeros((1, 2), np.uint16)):
        elements.put(array, 0, 1, np.float32(1.5))
        assert elements.get(array, 0, 1) == 1.5
    assert array[0, 1] == 0x3FC0  # 1.5 in bfloat16
