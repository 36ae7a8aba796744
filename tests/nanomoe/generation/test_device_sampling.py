"""Tokens chosen all at once beside those of the rule, which chooses one after another."""

import numpy as np
import pytest
import torch

from nanomoe.config import SamplingConfig
from nanomoe.generation.device_sampling import RunningSum, choose_all
from nanomoe.generation.sampling import Candidates, choose

SAMPLINGS = [
    SamplingConfig(temperature=0),
    SamplingConfig(top_k=1),
    SamplingConfig(),
    SamplingConfig(temperature=3.0),
    SamplingConfig(temperature=0.8, top_k=200),
    SamplingConfig(temperature=2.0, top_k=7),
    SamplingConfig(top_k=100_000),
    SamplingConfig(top_p=0.9),
    SamplingConfig(top_p=0.05),
    SamplingConfig(temperature=1.5, top_k=40, top_p=0.5),
    SamplingConfig(top_p=1.0),
    SamplingConfig(temperature=1e-300),
]
WITHOUT_TOP_P = [one for one in SAMPLINGS if one.top_p is None]


def assert_chosen_as_by_the_rule(
    logits_NV: torch.Tensor, samplings: list[SamplingConfig], uniforms: list[float]
) -> None:
    found = choose_all(logits_NV, samplings, uniforms)
    rows = zip(logits_NV.numpy(), samplings, uniforms, strict=True)
    assert found == [choose(Candidates(logits_V), sampling, uniform) for logits_V, sampling, uniform in rows]


@pytest.mark.parametrize("among", [SAMPLINGS, WITHOUT_TOP_P, [SamplingConfig(), SAMPLINGS[0]], SAMPLINGS[:2]])
@pytest.mark.parametrize("vocab_size", [5, 256, 1000, 8192])
def test_each_is_chosen_as_alone_whatever_the_others_want(vocab_size: int, among: list[SamplingConfig]) -> None:
    generator = np.random.default_rng(vocab_size)
    for spread in (0.1, 2.0, 20.0):
        samplings = [among[n % len(among)] for n in range(48)]
        logits = torch.from_numpy(generator.normal(0, spread, (48, vocab_size)).astype(np.float32))
        assert_chosen_as_by_the_rule(logits, samplings, generator.random(48).tolist())


def test_equals_of_the_last_that_is_allowed_are_allowed() -> None:
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(generator.integers(0, 4, (600, 300)).astype(np.float32))  # many equals
    samplings = [SAMPLINGS[n % len(SAMPLINGS)] for n in range(600)]
    assert_chosen_as_by_the_rule(logits, samplings, generator.random(600).tolist())


def test_the_least_and_the_largest_uniform_number_choose_a_token_with_a_weight() -> None:
    logits = torch.full((1, 700), -1e5)
    logits[0, [300, 600]] = 0.0
    for uniform, token in ((0.0, 300), (0.499, 300), (0.501, 600), (1 - 2**-53, 600)):
        for sampling in (SamplingConfig(), SamplingConfig(top_k=2), SamplingConfig(top_p=0.99)):
            assert choose_all(logits, [sampling], [uniform]) == [token]


def test_frequencies_are_the_probabilities_of_the_softmax() -> None:
    n, logits_V = 20_000, torch.linspace(-2, 2, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    uniforms = np.random.default_rng(2).random(n).tolist()
    chosen = choose_all(logits_V.expand(n, -1), [SamplingConfig(temperature=1.3)] * n, uniforms)
    counts = torch.bincount(torch.tensor(chosen), minlength=300)
    expected = (logits_V.double() / 1.3).softmax(-1) * n
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 300 + 5 * (2 * 300) ** 0.5


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "sampling", [SAMPLINGS[0], SamplingConfig(), SamplingConfig(top_k=2), SamplingConfig(top_p=0.5)]
)
def test_logits_that_are_not_finite_choose_nothing(broken: float, sampling: SamplingConfig) -> None:
    logits = torch.tensor([[0.0, broken, 1.0], [0.0, 5.0, -torch.inf]])
    assert choose_all(logits[1:], [SAMPLINGS[0]], [0.5]) == [1]
    with pytest.raises(ValueError, match="overflow float32"):
        choose_all(logits, [sampling, SAMPLINGS[0]], [0.5, 0.5])


def test_running_sums_are_those_of_float64() -> None:
    weights = torch.rand(4, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sums, expected = RunningSum(weights), weights.cumsum(-1)
    torch.testing.assert_close(sums.total_N, expected[:, -1], rtol=1e-14, atol=0)
    for place in (0, 1, 255, 256, 257, 998):
        target = expected[:, place] * (1 + 1e-12)
        assert sums.first(target, reached=False).tolist() == [place + 1] * 4
        assert sums.first(target * (1 - 2e-12), reached=True).tolist() == [place] * 4


@pytest.mark.gpu
def test_a_gpu_chooses_as_the_rule_does() -> None:
    generator = np.random.default_rng(7)
    logits = torch.from_numpy(generator.normal(0, 2, (64, 50_257)).astype(np.float32))
    samplings, uniforms = [SAMPLINGS[n % len(SAMPLINGS)] for n in range(64)], generator.random(64).tolist()
    assert choose_all(logits.cuda(), samplings, uniforms) == choose_all(logits, samplings, uniforms)
