import pytest
import torch
from torch import Tensor

from nanomoe.model.dropout import EMBEDDING, Dropout, mix


def draw(p: float = 0.2, seed: int = 1, step: int = 0, windows: tuple[int, ...] = (0,), layer: int = 0) -> Tensor:
    dropout = Dropout(p, seed=seed, step=step, windows=windows, device=torch.device("cpu"), dtype=torch.float32)
    return dropout.layer(layer, 6400).take(64, 100)


def test_a_mask_keeps_its_share_and_scales_it_so_that_the_mean_stays() -> None:
    mask = draw(windows=tuple(range(50)))
    kept = (mask > 0).double().mean().item()
    assert kept == pytest.approx(0.8, abs=0.005)
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - round(0.2 * 65536) / 65536)], rel=1e-6)


def test_the_bits_of_neighbouring_elements_are_independent() -> None:
    kept = (draw(p=0.5, windows=tuple(range(100))) > 0).double().flatten() - 0.5
    for lag in (1, 2, 3, 4, 64):
        assert abs((kept[:-lag] * kept[lag:]).mean().item()) < 4 * 0.25 / len(kept) ** 0.5


def test_a_mask_depends_on_nothing_but_seed_step_window_and_layer() -> None:
    alone, together = draw(windows=(3,)), draw(windows=(1, 3, 2))
    assert torch.equal(alone[0], together[1])
    others = [draw(windows=(4,)), draw(windows=(3,), step=1), draw(windows=(3,), seed=2), draw(windows=(3,), layer=1)]
    assert not any(torch.equal(alone, other) for other in others)
    assert not torch.equal(alone, draw(windows=(3,), layer=EMBEDDING))


def test_a_mask_is_the_same_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        masks = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            masks.append(draw(windows=tuple(range(8))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)


def test_masks_of_one_layer_are_cut_from_one_draw_without_overlap() -> None:
    dropout = Dropout(0.5, seed=1, step=0, windows=(0, 1), device=torch.device("cpu"), dtype=torch.float32)
    whole = dropout.layer(0, 24).take(24)
    parts = dropout.layer(0, 24)
    assert torch.equal(torch.cat([parts.take(2, 4).flatten(1), parts.take(16)], dim=1), whole)


def test_router_noise_is_standard_normal_and_keyed_like_the_masks() -> None:
    def noise(windows: tuple[int, ...]) -> Tensor:
        dropout = Dropout(0.0, seed=1, step=5, windows=windows, device=torch.device("cpu"), dtype=torch.float32)
        return dropout.noise(1, 100, 50)

    many = noise(tuple(range(20)))
    assert many.mean().item() == pytest.approx(0, abs=0.02)
    assert many.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(noise((7,))[0], many[7])


def test_keys_of_neighbours_differ_in_half_of_their_bits() -> None:
    flips = [(mix(1, step) ^ mix(1, step + 1)).bit_count() for step in range(1000)]
    assert sum(flips) / len(flips) == pytest.approx(32, abs=1)
    assert mix(1, 2) != mix(2, 1)
