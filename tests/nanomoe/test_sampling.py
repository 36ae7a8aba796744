from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomoe import sampling as sampling_module
from nanomoe.sampling import BLOCK, TIE, NoiseStream, Sampling, choose, choose_among_blocks

SAMPLINGS = [
    Sampling(0),
    Sampling(1.0),
    Sampling(0.8, top_k=7),
    Sampling(1.5, top_p=0.7),
    Sampling(0.6, top_k=40, top_p=0.9),
    Sampling(1e-300),
]


def _logits(vocab_size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, vocab_size)


def _drawn(logits: np.ndarray, sampling: Sampling, n: int) -> np.ndarray:
    noise = NoiseStream(0, 0, len(logits))
    return np.array([choose(logits, sampling, noise.draw()) for _ in range(n)])


def test_temperature_zero_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    assert choose(np.array([1.0, 3.0, 2.0, 3.0]), Sampling(0)) == 1
    assert choose(np.array([3.0, 3.0 + 1e-12]), Sampling(0)) == 0
    assert choose(np.array([1.0, 2.0]), Sampling(0), ids=np.array([9, 4])) == 4


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    logits = _logits(3 * BLOCK, 1)
    expected = np.exp(logits / 1.3) / np.exp(logits / 1.3).sum()
    n = 20_000
    counts = np.bincount(_drawn(logits, Sampling(1.3), n), minlength=len(logits))
    common = expected * n > 20
    chi_square = ((counts - expected * n) ** 2 / (expected * n))[common].sum()
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_top_k_draws_only_the_k_likeliest_and_all_of_them() -> None:
    logits = _logits(600, 2)
    assert set(_drawn(logits, Sampling(5.0, top_k=4), 500)) == set(np.argsort(-logits)[:4])


def test_top_p_draws_only_the_smallest_set_that_holds_the_mass() -> None:
    probabilities = np.full(600, 1e-5)
    probabilities[[5, 300, 599]] = 0.5, 0.3, 0.15  # 0.523, 0.837 and 0.994 of all, summed up
    assert set(_drawn(np.log(probabilities), Sampling(1.0, top_p=0.8), 300)) == {5, 300}
    assert set(_drawn(np.log(probabilities), Sampling(1.0, top_p=0.9), 300)) == {5, 300, 599}


def test_top_p_counts_the_mass_within_top_k() -> None:
    logits = np.log(np.array([0.35, 0.3, 0.2, 0.15]))
    assert set(_drawn(logits, Sampling(1.0, top_p=0.5), 200)) == {0, 1}
    assert set(_drawn(logits, Sampling(1.0, top_k=2, top_p=0.5), 200)) == {0}


def test_top_p_of_an_even_distribution_reaches_far_into_the_vocabulary() -> None:
    logits = np.linspace(0, 0.01, 5000)
    assert min(_drawn(logits, Sampling(1.0, top_p=0.5), 300)) > 2400
    assert min(_drawn(logits, Sampling(1.0, top_p=0.99), 300)) < 200


def test_a_seed_and_an_index_decide_the_noise() -> None:
    def first(seed: int, index: int) -> float:
        return float(NoiseStream(seed, index, 300).draw().places[0])

    assert first(1, 0) == first(1, 0)
    assert len({first(1, 0), first(1, 1), first(2, 0), first(2**63 - 1, 0)}) == 4


@given(
    seed=st.integers(0, 2**32 - 1),
    sampling=st.sampled_from(SAMPLINGS),
    error=st.sampled_from([1e-5, 1e-3, 1e-2]),
    vocab_size=st.sampled_from([1, 50, 256, 257, 2000]),
)
def test_what_is_certain_of_rounded_logits_is_true_of_the_exact_ones(
    seed: int, sampling: Sampling, error: float, vocab_size: int
) -> None:
    exact = _logits(vocab_size, seed)
    noise = NoiseStream(seed, 0, vocab_size).draw()
    rounding = np.random.default_rng(seed + 1).uniform(-error, error, vocab_size)
    rounded = (exact + rounding).astype(np.float32)
    certain = choose(rounded, sampling, noise, error=error + 1e-6)
    assert certain in (None, choose(exact, sampling, noise))


@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([1e-300, 0.3, 1.0, 20.0]),
    bound=st.sampled_from([1e-3, 0.05, 1.0]),
    vocab_size=st.sampled_from([1, 256, 257, 5000]),
)
def test_refining_a_few_blocks_of_rough_logits_gives_the_token_of_the_exact_ones(
    seed: int, temperature: float, bound: float, vocab_size: int
) -> None:
    exact = _logits(vocab_size, seed)
    noise = NoiseStream(seed, 0, vocab_size).draw()
    chance = np.random.default_rng(seed + 1)
    rough = exact + chance.uniform(-bound, bound, vocab_size)
    better = (exact + chance.uniform(-1e-4, 1e-4, vocab_size)).astype(np.float32)

    def refine(block: int) -> np.ndarray:
        return better[block * BLOCK : (block + 1) * BLOCK]

    certain = choose_among_blocks(
        (rough / 0.02).astype(np.float32), 0.02, bound + 1e-5, refine, 1.01e-4, temperature, noise
    )
    assert certain in (None, choose(exact, Sampling(temperature), noise))


def test_refining_nearly_always_decides() -> None:
    undecided = 0
    noise = NoiseStream(0, 0, 50_000)
    for seed in range(50):
        exact = _logits(50_000, seed).astype(np.float32)
        rough = exact + np.float32(0.04) * np.sin(np.arange(50_000), dtype=np.float32)
        refine = partial(lambda logits, block: logits[block * BLOCK : (block + 1) * BLOCK], exact)
        undecided += choose_among_blocks(rough, 1.0, 0.041, refine, 1e-5, 1.0, noise.draw()) is None
    assert undecided <= 2


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rounded_logits_are_nearly_always_enough(sampling: Sampling) -> None:
    noise = NoiseStream(0, 0, 2000)
    error = 1e-5
    logits = [_logits(2000, seed).astype(np.float32) for seed in range(100)]
    undecided = sum(choose(row, sampling, noise.draw(), error=error) is None for row in logits)
    # A temperature near 0 magnifies any error without limit.
    assert undecided == 100 if 0 < sampling.temperature < 1e-9 else undecided <= 3


def test_a_tie_is_never_certain() -> None:
    noise = NoiseStream(0, 0, 2).draw()
    equal = np.zeros(2, np.float32)
    assert choose(equal, Sampling(0), error=1e-6) is None
    noise.places[:2] = 0
    assert choose(equal, Sampling(1.0), noise, error=1e-6) is None


def test_what_may_be_a_tie_of_the_exact_logits_is_not_certain() -> None:
    low, high = 1.0 - TIE / 2, 1.0
    assert choose(np.array([low, high]), Sampling(0)) == 0
    assert choose(np.array([low - TIE, high + TIE]), Sampling(0), error=1.01 * TIE) is None


@pytest.mark.parametrize("temperature", [1e-7, 1e-6, 3e-6, 1e-5])
def test_near_temperature_0_a_weight_that_underflows_is_not_forgotten(temperature: float) -> None:
    error = 2e-5
    for seed in range(50):
        given, exact = np.full(512, -1, np.float32), np.full(512, -1.0)
        given[[7, 300]] = 0, -1.5e-5
        exact[[7, 300]] = -1.9e-5, 0.4e-5
        noise = NoiseStream(seed, 0, 512).draw()
        token = choose(exact, Sampling(temperature), noise)
        assert choose(given, Sampling(temperature), noise, error=error) in (None, token)
        refine = partial(lambda logits, block: logits[block * BLOCK : (block + 1) * BLOCK], given)
        assert choose_among_blocks(given, 1.0, error, refine, error, temperature, noise) in (None, token)


def test_equals_of_the_last_that_top_p_allows_are_allowed() -> None:
    logits = np.array([0.0, 1e-14, -9.0])
    assert set(_drawn(logits, Sampling(1.0, top_p=0.3), 50)) == {0, 1}


def test_a_token_at_the_edge_of_top_k_is_chosen_only_if_it_surely_belongs() -> None:
    logits = np.array([2.0, 1.0, 1.0 - 1e-7], np.float32)
    noise = NoiseStream(0, 0, 3).draw()
    noise.places[:3] = 0, 50, 0
    assert choose(logits, Sampling(1.0, top_k=2), noise, error=1e-6) is None
    noise.places[:3] = 50, 0, 0
    assert choose(logits, Sampling(1.0, top_k=2), noise, error=1e-6) == 0


def test_a_token_at_the_edge_of_top_p_is_chosen_only_if_it_surely_belongs() -> None:
    n_sorted = sampling_module._NUCLEUS  # the edge is also the end of what is sorted
    logits = np.full(n_sorted + 500, -3.0)
    logits[:n_sorted] = np.linspace(0, -0.5, n_sorted)
    logits[n_sorted] = -0.5 - 2.0**-22
    weights = np.exp(logits)
    sampling = Sampling(1.0, top_p=(weights[: n_sorted - 1].sum() + weights[n_sorted - 1] / 2) / weights.sum())
    noise = NoiseStream(0, 0, len(logits)).draw()
    noise.blocks[n_sorted // BLOCK] = 50
    noise.places[n_sorted % BLOCK] = 50
    assert choose(logits, sampling, noise) != n_sorted
    assert choose(logits.astype(np.float32), sampling, noise, error=1e-6) is None


def test_candidates_give_the_token_that_all_logits_give() -> None:
    logits = _logits(5000, 4)
    noise = NoiseStream(4, 0, 5000)
    ids = np.random.default_rng(5).permutation(np.argsort(-logits)[:60])
    for _ in range(50):
        drawn = noise.draw()
        sampling = Sampling(1.0, top_k=40, top_p=0.95)
        assert choose(logits[ids], sampling, drawn, ids=ids) == choose(logits, sampling, drawn)
