import math
import statistics
from itertools import pairwise

import pytest
import torch

from nanomoe.data import Windows
from nanomoe.evaluation.evaluated_text import EvaluatedText, entropy_baselines

TOKENS = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(1))


def text(max_targets: int, n_tokens: int = 1000, block_size: int = 8) -> EvaluatedText:
    return EvaluatedText(Windows(TOKENS[:n_tokens], block_size), max_targets)


@pytest.mark.parametrize(("n_tokens", "max_targets"), [(2, 256), (9, 256), (257, 256), (1000, 999), (1000, 5000)])
def test_a_text_of_at_most_so_many_targets_is_read_whole(n_tokens: int, max_targets: int) -> None:
    read = text(max_targets, n_tokens)
    assert read.is_whole
    assert read.n_targets == n_tokens - 1
    assert read.positions().tolist() == list(range(n_tokens - 1))


@pytest.mark.parametrize("max_targets", [8, 20, 256, 257, 500, 998])
def test_of_a_longer_text_as_many_whole_windows_are_read_as_fit_spread_evenly(max_targets: int) -> None:
    read = text(max_targets)
    n, count = len(read.windows), read.all_windows.count
    assert not read.is_whole
    assert n == max_targets // 8
    assert read.n_targets <= max_targets
    assert len(set(read.windows)) == n
    edges = [-1 - read.windows[0], *read.windows, 2 * count - 1 - read.windows[-1]]
    gaps = [after - before for before, after in pairwise(edges)]
    assert max(gaps) - min(gaps) <= 1 + (n == 1)


def test_at_least_one_window_is_read() -> None:
    assert text(256, block_size=400).windows == [1]


@pytest.mark.parametrize("max_targets", [8, 200, 998, 5000])
def test_positions_are_those_whose_successors_are_the_targets_in_their_order(max_targets: int) -> None:
    read = text(max_targets)
    inputs, targets = read.all_windows.batch(read.windows)
    counted = targets != -1
    assert TOKENS[read.positions()].tolist() == inputs[counted].tolist()
    assert TOKENS[read.positions() + 1].tolist() == targets[counted].tolist()
    assert [w for batch in read.batches(3) for w in batch] == read.windows


def test_the_standard_error_is_that_of_the_means_of_windows_out_of_a_finite_text() -> None:
    read = text(200)
    losses = torch.rand(read.n_targets, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    means = losses.view(25, 8).mean(1).tolist()
    expected = statistics.stdev(means) / math.sqrt(25) * math.sqrt(1 - 25 / 125)
    assert read.standard_error(losses.tolist()) == pytest.approx(expected, rel=1e-12)
    assert text(5000).standard_error([1.0] * 999) == 0
    assert text(8).standard_error([1.0] * 8) is None


def test_the_standard_error_is_as_large_as_the_error_of_many_texts() -> None:
    """Of texts whose windows differ in difficulty: the error over its estimate has a variance of about 1."""
    generator = torch.Generator().manual_seed(3)
    read = text(200)
    ratios = []
    for _ in range(400):
        of_windows = torch.randn(125, 1, generator=generator) + torch.randn(125, 8, generator=generator)
        losses = of_windows.double().flatten()[:999]
        found = losses[read.positions()]
        error = read.standard_error(found.tolist())
        assert error is not None
        ratios.append((found.mean() - losses.mean()).item() / error)
    assert statistics.pstdev(ratios) == pytest.approx(1, abs=0.15)


def test_baselines_are_counted_once_and_in_parts_between_which_a_stop_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = entropy_baselines(TOKENS.tolist(), 50)
    monkeypatch.setattr("nanomoe.evaluation.evaluated_text._COUNTED_AT_ONCE", 100)
    read, asked = text(200), []
    assert read.baselines(50, lambda: asked.append(1)) == expected
    assert len(asked) == 30
    assert read.baselines(50, lambda: asked.append(1)) == expected
    assert len(asked) == 30
