"""What the evaluations of a job read of a text: all of its windows or some of them, the same at every checkpoint.

Knows no model and no tokenizer.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from nanomoe.data import Windows
from nanomoe.evaluation.metrics import Baselines

RaiseIfStopped = Callable[[], None]
"""Called between two parts of a long computation; raises where the computation should not go on."""

_COUNTED_AT_ONCE = 1 << 16
"""Tokens that are counted between two calls of a `RaiseIfStopped`, and between two releases of the interpreter's lock:
milliseconds."""


def go_on() -> None:
    """A `RaiseIfStopped` of a computation that nobody stops."""


class EvaluatedText:
    """A text and the windows of it that evaluations read: all, or as many as hold `max_targets` targets, at least one,
    spread evenly."""

    def __init__(self, windows: Windows, max_targets: int) -> None:
        self.all_windows = windows
        n = windows.count
        if windows.n_targets_in_all > max_targets:
            n = min(n, max(1, max_targets // windows.length))
        self.windows = [(2 * i + 1) * windows.count // (2 * n) for i in range(n)]
        """The windows that are read, ascending: the middle one of each of n equal parts of the text."""
        self.n_targets_of_each = [windows.n_targets([window]) for window in self.windows]
        """Targets of each of `windows`."""
        self._baselines: Baselines | None = None

    @property
    def n_targets(self) -> int:
        """Targets that are read."""
        return sum(self.n_targets_of_each)

    @property
    def is_whole(self) -> bool:
        """Whether every target of the text is read."""
        return len(self.windows) == self.all_windows.count

    def positions(self) -> Tensor:
        """(targets,) int64: the position in the text of each token whose successor is a target that is read."""
        starts = [window * self.all_windows.length for window in self.windows]
        spans = zip(starts, self.n_targets_of_each, strict=True)
        return torch.cat([torch.arange(start, start + n) for start, n in spans])

    def batches(self, per_batch: int) -> Iterator[list[int]]:
        """The windows that are read, `per_batch` at a time."""
        for first in range(0, len(self.windows), per_batch):
            yield self.windows[first : first + per_batch]

    def standard_error(self, losses: list[float]) -> float | None:
        """Standard error of the mean of `losses` as an estimate of the whole text's: 0 where all of it was read, None
        for a single window.

        Windows are drawn, not tokens, since losses within a window go together: s / sqrt(n) of the n windows' means,
        times sqrt(1 - n / N) because they are n of a finite number N (Cochran, Sampling Techniques, 2.6).
        """
        n = len(self.windows)
        if self.is_whole:
            return 0.0
        if n == 1:
            return None
        rest = iter(losses)
        means = [math.fsum(islice(rest, n_targets)) / n_targets for n_targets in self.n_targets_of_each]
        mean = math.fsum(means) / n
        variance = math.fsum((one - mean) ** 2 for one in means) / (n - 1)
        return math.sqrt(variance / n * (1 - n / self.all_windows.count))

    def baselines(self, vocab_size: int, raise_if_stopped: RaiseIfStopped = go_on) -> Baselines:
        """What simpler predictors would reach on all of the text; counted once."""
        if self._baselines is None:
            self._baselines = entropy_baselines(self.all_windows.tokens, vocab_size, raise_if_stopped)
        return self._baselines


def entropy_baselines(tokens: list[int], vocab_size: int, raise_if_stopped: RaiseIfStopped = go_on) -> Baselines:
    """What simpler predictors would reach on this text's targets, nats per token.

    `uniform` knows nothing: ln V. `unigram` knows how often each token is a target: the entropy H(x). `bigram` knows
    that for each preceding token: the conditional entropy H(x_t | x_{t-1}).
    """

    def entropy(things: Iterator[Any]) -> float:
        counts: Counter[Any] = Counter()
        while part := list(islice(things, _COUNTED_AT_ONCE)):
            raise_if_stopped()
            counts.update(part)
        n = counts.total()
        return -sum(c / n * math.log(c / n) for c in counts.values())

    unigram = entropy(islice(tokens, 1, None))
    bigram = entropy(pairwise(tokens)) - entropy(islice(tokens, len(tokens) - 1))
    return Baselines(uniform=math.log(vocab_size), unigram=max(0.0, unigram), bigram=max(0.0, bigram))
