"""The loops of a router against tensor operations and the formulas of `nanomoe.model.moe`."""

import numpy as np
import torch

from nanomoe.config import ModelConfig
from nanomoe.model.dropout import Dropout, Site
from nanomoe.model.moe import Assignments
from nanomoe.training.steps.loops import keys, routing


def routed(logits: torch.Tensor, bias: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts and the counts."""
    N, E = logits.shape
    scores, gates = np.empty((N, E), np.float32), np.empty((N, k), np.float32)
    chosen, counts = np.empty((N, k), np.int64), np.ones(E, np.int64)
    routing.route(logits.numpy(), False, bias.numpy(), True, scores, chosen, gates, counts)
    np.testing.assert_allclose(scores, logits.softmax(-1), rtol=1e-6)
    np.testing.assert_allclose(gates.sum(1), 1, rtol=1e-6)
    return torch.from_numpy(chosen), torch.from_numpy(counts)


def test_the_highest_scores_are_chosen_and_of_ties_the_lowest_index() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (200, 12), generator=generator).float()
    for k in (1, 3, 12):
        for bias in (torch.zeros(12), torch.randn(12, generator=generator)):
            chosen, counts = routed(logits, bias, k)
            expected = (logits.softmax(-1) + bias).sort(dim=-1, descending=True, stable=True).indices[:, :k]
            if not bias.any():
                assert torch.equal(chosen, expected)
            assert torch.equal(counts, torch.bincount(chosen.flatten(), minlength=12))
            assert all(len(set(row)) == k for row in chosen.tolist())
            assert (chosen == expected).float().mean() > 0.99


def test_of_scores_that_are_not_numbers_experts_are_chosen_all_the_same() -> None:
    chosen, counts = np.full((1, 2), -1), np.zeros(4, np.int64)
    logits, scores, gates = (
        np.full((1, 4), np.nan, np.float32),
        np.empty((1, 4), np.float32),
        np.empty((1, 2), np.float32),
    )
    routing.route(logits, False, np.zeros(4, np.float32), True, scores, chosen, gates, counts)
    assert chosen.tolist() == [[0, 1]]
    assert np.isnan(gates).all()


def test_rows_lie_by_expert_in_token_order_and_those_beyond_the_capacity_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(30)])
    for capacity in (4, 60):
        reference = Assignments.of(chosen, 5)
        starts, slots, tokens = np.empty(6, np.int64), np.empty((30, 2), np.int64), np.empty(60, np.int64)
        n_rows = routing.assign(chosen.numpy(), reference.counts_E.numpy(), capacity, starts, slots, tokens)
        kept = reference.ranks() < capacity
        assert n_rows == kept.sum()
        assert np.array_equal(slots >= 0, kept)
        assert np.diff(starts).tolist() == reference.counts_E.clamp(max=capacity).tolist()
        for token in range(30):
            for choice in range(2):
                slot = slots[token, choice]
                if slot >= 0:
                    expert = int(chosen[token, choice])
                    assert tokens[slot] == token
                    assert slot == starts[expert] + reference.ranks()[token, choice]


def test_noise_is_that_of_the_tensor_operations() -> None:
    config = ModelConfig(use_moe=True, router_noise=True)
    dropout = Dropout(config, seed=7, step=3, windows=[4, 11], device=torch.device("cpu"), dtype=torch.float32)
    words = np.empty((config.n_layer + 1, len(Site), 2, config.n_head, 2), np.uint32)
    keys.plane_keys(np.uint64(7), np.uint64(3), np.array([4, 11]), words)
    T, E = 50, config.n_experts
    logits, raw, noise, noisy = (np.zeros((2 * T, E), np.float32) for _ in range(4))
    raw[:] = np.linspace(-30, 30, E)
    routing.add_noise(T, words[2, Site.ROUTER_NOISE], raw, logits, noise, noisy)
    expected = dropout.noise(1, T, E).flatten(0, 1)
    torch.testing.assert_close(torch.from_numpy(noise), expected, rtol=1e-6, atol=0)
    size = torch.nn.functional.softplus(torch.from_numpy(raw))
    torch.testing.assert_close(torch.from_numpy(noisy), expected * size, rtol=1e-5, atol=0)
