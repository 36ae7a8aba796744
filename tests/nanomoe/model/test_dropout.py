import pytest
import torch
from torch import Tensor

from nanomoe.config import ModelConfig
from nanomoe.model.dropout import (
    EMBEDDING,
    Dropout,
    Site,
    mix,
    new_counters,
    plane_keys,
    plane_keys_on_device,
    window_keys,
)

CPU = torch.device("cpu")
HEADS = 4


def drawn_by(
    p: float = 0.2, seed: int = 1, step: int = 0, windows: tuple[int, ...] = (0,), n_layer: int = 4
) -> Dropout:
    config = ModelConfig(dropout=p, n_head=HEADS, n_layer=n_layer)
    return Dropout(config, seed=seed, step=step, windows=windows, device=CPU, dtype=torch.float32)


def draw(dropout: Dropout, layer: int = 0, site: Site = Site.ATTENTION_WEIGHTS) -> Tensor:
    return dropout.mask(layer, site, HEADS, 64, 101)


def test_an_element_is_the_documented_hash_of_its_coordinates() -> None:
    """In Python's integers, of any length: products of 32-bit integers wrap around, in a tensor's last elements too."""
    seed, step, window, layer = 7, 3, 11, 2
    mask = drawn_by(0.3, seed, step, (5, window)).mask(layer, Site.MLP_OUTPUT, HEADS, 9, 37)

    def kept(plane: int, row: int, column: int) -> bool:
        key = mix(seed, step, window, layer + 1, Site.MLP_OUTPUT, plane)
        x = (key + (row << 15 | column >> 1)) % 2**32
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32 ^ key >> 32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        x ^= x >> 15
        draw = (x >> 16 if column % 2 else x) % 2**16
        signed = draw - 2**16 if draw >= 2**15 else draw
        return signed + 2**15 >= round(0.3 * 2**16)

    expected = [[[kept(plane, row, column) for column in range(37)] for row in range(9)] for plane in range(HEADS)]
    assert ((mask[1] > 0) == torch.tensor(expected)).all()


def test_a_mask_keeps_its_share_and_scales_it_so_that_the_mean_stays() -> None:
    for p in (0.1, 0.2, 0.5):
        mask = draw(drawn_by(p, windows=tuple(range(40))))
        deviation = (p * (1 - p) / mask.numel()) ** 0.5
        assert (mask > 0).double().mean().item() == pytest.approx(1 - p, abs=4 * deviation)
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - round(p * 65536) / 65536)], rel=1e-6)


@pytest.mark.parametrize(
    "lag", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), (0, 0, 64), (0, 1, 1), (0, 16, 0), (1, 1, 1)]
)
def test_elements_whose_coordinates_differ_are_independent(lag: tuple[int, int, int]) -> None:
    kept = (draw(drawn_by(0.5, windows=tuple(range(40)))) > 0).double() - 0.5
    plane, row, column = lag
    one = kept[:, plane:, row:, column:]
    other = kept[:, : HEADS - plane, : 64 - row, : 101 - column]
    assert abs((one * other).mean().item()) < 4 * 0.25 / one.numel() ** 0.5


@pytest.mark.parametrize("differs", ["seed", "step", "windows", "layer", "site"])
def test_masks_of_another_seed_step_window_layer_or_site_are_independent(differs: str) -> None:
    def mask(n: int) -> Tensor:
        keys = {"seed": 1, "step": 0, "windows": 0} | ({differs: n} if differs not in ("layer", "site") else {})
        dropout = drawn_by(0.5, keys["seed"], keys["step"], (keys["windows"],), n_layer=30)
        return draw(dropout, n if differs == "layer" else 0, Site(n if differs == "site" else 0))

    kept = torch.stack([(mask(n) > 0).double() - 0.5 for n in range(3 if differs == "site" else 30)])
    products = kept[1:] * kept[:-1]
    assert abs(products.mean().item()) < 4 * 0.25 / products.numel() ** 0.5


def test_a_window_has_the_same_mask_in_whatever_batch_it_travels() -> None:
    alone, together = drawn_by(windows=(3,)), drawn_by(windows=(1, 3, 2))
    assert torch.equal(draw(alone)[0], draw(together)[1])
    assert torch.equal(draw(alone, EMBEDDING)[0], draw(together, EMBEDDING)[1])


def test_a_longer_text_or_more_channels_change_no_element_of_the_shorter() -> None:
    dropout = drawn_by()
    small, large = dropout.mask(0, Site(0), 2, 10, 13), dropout.mask(0, Site(0), 4, 30, 40)
    assert torch.equal(small, large[:, :2, :10, :13])


def test_a_mask_is_the_same_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        masks = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            masks.append(draw(drawn_by(windows=tuple(range(8)))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)


def test_router_noise_is_standard_normal_and_keyed_like_the_masks() -> None:
    many = drawn_by(windows=tuple(range(20))).noise(1, 100, 50)
    assert many.shape == (20, 100, 50)
    assert many.mean().item() == pytest.approx(0, abs=0.02)
    assert many.std().item() == pytest.approx(1, abs=0.02)
    assert (many.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=0.003)
    assert (many[..., 1:] * many[..., :-1]).mean().item() == pytest.approx(0, abs=0.02)
    assert torch.equal(drawn_by(windows=(7,)).noise(1, 100, 50)[0], many[7])


@pytest.mark.gpu
def test_masks_are_the_same_on_a_gpu_and_noise_is_but_for_rounding() -> None:
    config = ModelConfig(dropout=0.3, n_head=HEADS)
    here, there = (
        Dropout(config, seed=5, step=8, windows=[2, 9], device=torch.device(device), dtype=torch.float32)
        for device in ("cpu", "cuda")
    )
    for layer, site in ((EMBEDDING, Site.ATTENTION_OUTPUT), (0, Site.ATTENTION_WEIGHTS), (3, Site.MLP_OUTPUT)):
        assert torch.equal(draw(there, layer, site).cpu(), draw(here, layer, site))
    torch.testing.assert_close(there.noise(1, 50, 8).cpu(), here.noise(1, 50, 8), rtol=1e-6, atol=1e-6)


def test_keys_of_neighbours_differ_in_half_of_their_bits() -> None:
    flips = [(mix(1, step) ^ mix(1, step + 1)).bit_count() for step in range(1000)]
    assert sum(flips) / len(flips) == pytest.approx(32, abs=1)
    assert mix(1, 2) != mix(2, 1)


def test_the_keys_of_all_planes_at_once_are_those_of_one_after_another() -> None:
    config = ModelConfig(n_layer=2, n_head=4)
    keys = plane_keys(config, 5, [3, 9], 2**62 + 1)
    assert keys.shape == (3, len(Site), 2, 4)
    assert keys[2, 1, 1, 3] == mix(2**62 + 1, 5, 9, 2, 1, 3)


def test_keys_computed_on_a_device_are_those_of_the_host() -> None:
    config = ModelConfig(n_layer=3, n_head=4, router_noise=True, use_moe=True)
    for seed, step in ((0, 0), (2**62 + 1, 5), (2**63 - 1, 10**9)):
        windows = [0, 3, 70_000]
        keys_B = torch.tensor(window_keys(step, windows, seed))
        keys = plane_keys_on_device(config, keys_B)
        assert keys.numpy().tobytes() == plane_keys(config, step, windows, seed).tobytes()
        there = Dropout.of_window_keys(config, keys_B, dtype=torch.float32, counters=new_counters)
        here = Dropout(config, seed=seed, step=step, windows=windows, device=CPU, dtype=torch.float32)
        for layer, site in ((EMBEDDING, Site.ATTENTION_OUTPUT), (2, Site.MLP_OUTPUT)):
            assert torch.equal(draw(there, layer, site), draw(here, layer, site))
        assert torch.equal(there.noise(1, 20, 8), here.noise(1, 20, 8))
