import numpy as np
import pytest

from nanomoe.config import SamplingConfig
from nanomoe.generation.sampling import Candidates, choose, token_logprobs, uniform_stream


def _logits(vocab_size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, vocab_size).astype(np.float32)


def _choose(logits: np.ndarray, sampling: SamplingConfig, uniform: float = 0.0) -> int:
    return choose(Candidates(logits), sampling, uniform)


def _drawn(logits: np.ndarray, sampling: SamplingConfig, n: int) -> np.ndarray:
    uniforms = uniform_stream(0, 0).random(n).tolist()
    return np.array([_choose(logits, sampling, uniform) for uniform in uniforms])


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0), SamplingConfig(top_k=1)])
def test_greedy_takes_the_likeliest_and_the_lowest_of_equals(sampling: SamplingConfig) -> None:
    assert _choose(np.array([1.0, 3.0, 2.0, 3.0]), sampling) == 1
    assert choose(Candidates(np.array([1.0, 2.0]), np.array([4, 9])), sampling, 0.0) == 9


def test_a_uniform_number_picks_the_token_in_whose_share_it_falls() -> None:
    logits = np.log(np.array([0.2, 0.5, 0.3]))
    for uniform, token in ((0.0, 0), (0.199, 0), (0.201, 1), (0.699, 1), (0.701, 2), (1 - 2**-53, 2)):
        assert _choose(logits, SamplingConfig(), uniform) == token


def test_the_last_token_with_a_weight_is_the_last_that_can_be_drawn() -> None:
    logits = np.array([0.0, 0.0, -1e5])
    assert _choose(logits, SamplingConfig(), 1 - 2**-53) == 1
    assert _choose(np.array([3.0, 5.0, 4.0]), SamplingConfig(temperature=1e-300), 1 - 2**-53) == 1


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    logits = _logits(700, 1)
    expected = np.exp(logits / 1.3) / np.exp(logits / 1.3).sum()
    n = 20_000
    counts = np.bincount(_drawn(logits, SamplingConfig(temperature=1.3), n), minlength=len(logits))
    common = expected * n > 20
    chi_square = ((counts - expected * n) ** 2 / (expected * n))[common].sum()
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_top_k_draws_only_the_k_likeliest_and_all_of_them() -> None:
    logits = _logits(600, 2)
    assert set(_drawn(logits, SamplingConfig(temperature=5.0, top_k=4), 500)) == set(np.argsort(-logits)[:4])


def test_equals_of_the_last_that_top_k_or_top_p_allows_are_allowed() -> None:
    logits = np.array([1.0, 2.0, 1.0, 0.0])
    assert set(_drawn(logits, SamplingConfig(temperature=5.0, top_k=2), 100)) == {0, 1, 2}
    assert set(_drawn(np.array([0.0, 0.0, -9.0]), SamplingConfig(top_p=0.3), 50)) == {0, 1}


def test_top_p_draws_only_the_smallest_set_that_holds_the_mass() -> None:
    probabilities = np.full(600, 1e-5)
    probabilities[[5, 300, 599]] = 0.5, 0.3, 0.15  # 0.523, 0.837 and 0.994 of all, summed up
    assert set(_drawn(np.log(probabilities), SamplingConfig(top_p=0.8), 300)) == {5, 300}
    assert set(_drawn(np.log(probabilities), SamplingConfig(top_p=0.9), 300)) == {5, 300, 599}


def test_top_p_counts_the_mass_within_top_k() -> None:
    logits = np.log(np.array([0.35, 0.3, 0.2, 0.15]))
    assert set(_drawn(logits, SamplingConfig(top_p=0.5), 200)) == {0, 1}
    assert set(_drawn(logits, SamplingConfig(top_k=2, top_p=0.5), 200)) == {0}


def test_top_p_of_an_even_distribution_reaches_far_into_the_vocabulary() -> None:
    logits = np.linspace(0, 0.01, 5000)
    assert min(_drawn(logits, SamplingConfig(top_p=0.5), 300)) > 2400
    assert min(_drawn(logits, SamplingConfig(top_p=0.99), 300)) < 200


def test_a_seed_and_an_index_decide_what_is_drawn() -> None:
    def first(seed: int, index: int) -> float:
        return uniform_stream(seed, index).random()

    assert first(1, 0) == first(1, 0)
    assert len({first(1, 0), first(1, 1), first(2, 0), first(2**63 - 1, 0)}) == 4


def test_candidates_give_the_token_that_all_logits_give() -> None:
    logits = _logits(5000, 4)
    ids = np.sort(np.argsort(-logits)[:60])
    for uniform in uniform_stream(4, 0).random(50).tolist():
        sampling = SamplingConfig(top_k=40, top_p=0.95)
        assert choose(Candidates(logits[ids], ids), sampling, uniform) == _choose(logits, sampling, uniform)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(ValueError, match="overflow float32"):
        _choose(np.array([0.0, broken, 1.0]), SamplingConfig())


def test_logprobs_are_best_first_and_sum_to_one() -> None:
    logits = _logits(50, 5)
    found = token_logprobs(logits, 7, 50)
    assert np.isclose(sum(np.exp(one.logprob) for one in found.likeliest), 1)
    assert [one.token for one in found.likeliest] == np.argsort(-logits, kind="stable").tolist()
    assert found.chosen == next(one for one in found.likeliest if one.token == 7)
