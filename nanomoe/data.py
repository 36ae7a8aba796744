"""Token ids -> windows -> batches. An epoch's order is a pure function of (seed, epoch), so a cursor is one integer.

Knows no file and no tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomoe.config import JobConfig
from nanomoe.model.dropout import mix
from nanomoe.plan import Plan, n_windows

IGNORE = -1
"""The target that counts for nothing."""


class Windows:
    """A text of N tokens cut into windows of T = min(N, block_size) tokens; every token but the first is a target once.

    N <= block_size: a single window whose last target is ignored. Longer: windows of B = block_size tokens every B
    tokens, the last moved back to end with the text, its targets that an earlier window covers ignored.
    """

    def __init__(self, tokens_N: Tensor, block_size: int) -> None:
        n = len(tokens_N)
        assert n >= 2, "a text of fewer than two tokens has no target"
        self._n_tokens = n
        self._tokens = torch.cat([tokens_N, tokens_N.new_full((1,), IGNORE)])
        self.count = n_windows(n, block_size)
        self.length = min(n, block_size)
        self._offsets_T = torch.arange(self.length, device=tokens_N.device)

    @property
    def device(self) -> torch.device:
        """The device that batches are on."""
        return self._tokens.device

    def overwrite(self, tokens_N: Tensor) -> None:
        """Take another text of as many tokens, in the same place."""
        self._tokens[:-1].copy_(tokens_N)

    @property
    def padded_tokens(self) -> Tensor:
        """The text's token ids (N + 1), int64, and an ignored target after them."""
        return self._tokens

    @property
    def tokens(self) -> list[int]:
        """The text's token ids."""
        ids: list[int] = self._tokens[:-1].tolist()
        return ids

    def start(self, window: int) -> int:
        """The position in the text of the window's first token."""
        return max(0, min(window * self.length, self._n_tokens - 1 - self.length))

    def batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T), int64, of these windows; ignored targets are `IGNORE`."""
        return self.gather(torch.tensor(windows, device=self._tokens.device))

    def gather(self, windows_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same for windows whose numbers (B,), int64, lie on the device: nothing is read back."""
        firsts_B = windows_B * self.length  # the first position that no earlier window covers
        starts_B = firsts_B.clamp(max=self._n_tokens - 1 - self.length).clamp(min=0)
        positions_BT = starts_B[:, None] + self._offsets_T
        targets_BT = self._tokens[positions_BT + 1].masked_fill(positions_BT < firsts_B[:, None], IGNORE)
        return self._tokens[positions_BT], targets_BT

    def n_targets(self, windows: list[int]) -> int:
        """Targets of these windows that are not ignored."""
        return sum(min(self.length, self._n_tokens - 1 - w * self.length) for w in windows)

    @property
    def n_targets_in_all(self) -> int:
        """Targets of the text: all tokens but the first."""
        return self._n_tokens - 1

    def batches(self, per_batch: int) -> Iterator[list[int]]:
        """All windows in the text's order, `per_batch` at a time."""
        for first in range(0, self.count, per_batch):
            yield list(range(first, min(first + per_batch, self.count)))


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on."""

    epoch: int
    """From 1."""
    windows: list[int]
    """In the epoch's order."""

    def micro_batches(self, size: int) -> list[list[int]]:
        """The windows, at most `size` at a time."""
        return [self.windows[first : first + size] for first in range(0, len(self.windows), size)]


class Order:
    """Which windows every step of a job trains on: shuffled each epoch, never crossing one."""

    def __init__(self, config: JobConfig, plan: Plan) -> None:
        self._config = config
        self._plan = plan
        self._epoch = -1
        self._shuffled: list[int] = []

    def step(self, index: int) -> Step:
        """Step `index`, from 0. Any index may be asked for: resuming needs nothing but it."""
        epoch, within = divmod(index, self._plan.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix(self._config.seed, epoch))
            self._shuffled = torch.randperm(self._plan.n_windows, generator=generator).tolist()
            self._epoch = epoch
        per_step = self._config.batch_size * self._config.gradient_accumulation_steps
        return Step(epoch + 1, self._shuffled[within * per_step : (within + 1) * per_step])
