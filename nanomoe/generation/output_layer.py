"""From hidden states to the tokens that may come next: the tied embedding as output layer, logits_V = W_VC x_C.

A logit is float32, and the same bits whoever else is served and whether all tokens' logits are computed or few. Where
only the likeliest tokens can be chosen, a layer need not give the others: most of a token's cost is reading V rows of C
numbers. Which of what is given is chosen is `nanomoe.generation.sampling`'s to say.

Shape letters: N sequences, V vocabulary, C channels, K likeliest tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanomoe.config import SamplingConfig
from nanomoe.generation.sampling import Candidates

LONGEST_SHORT_LIST = 1024
"""A larger top_k is chosen from all logits."""


class OutputLayer(Protocol):
    """What gives the candidates for the next token."""

    @property
    def numerics(self) -> str:
        """How logits are computed, in words."""

    @property
    def n_bytes(self) -> int:
        """Memory beside the embedding itself."""

    @property
    def bytes_per_token(self) -> int:
        """What is read for one sequence where a short list is enough."""

    def candidates(self, hidden_NC: Tensor, counts: Sequence[int | None]) -> list[Candidates]:
        """For each hidden state at least the `count` likeliest tokens, ties of the last included; all tokens where its
        count is None. Valid until the next call."""


def candidates_needed(sampling: SamplingConfig, *, wants_logprobs: bool) -> int | None:
    """How many of the likeliest tokens suffice to choose the next; None where all are needed."""
    if wants_logprobs:
        return None
    if sampling.greedy:
        return 1
    return None if sampling.top_k is None or sampling.top_k > LONGEST_SHORT_LIST else sampling.top_k


class TensorOutputLayer:
    """The output layer in tensor operations, whose shapes never depend on the number of sequences: one by one on a
    CPU; all together, where the next tokens are chosen on the device, filled up to `n_rows`."""

    def __init__(self, wte_VC: Tensor, n_rows: int) -> None:
        self._wte_VC = wte_VC
        self.n_rows = n_rows
        """Most sequences whose logits are computed together."""

    @property
    def vocab_size(self) -> int:
        """Tokens that have a logit."""
        return len(self._wte_VC)

    @property
    def numerics(self) -> str:
        """How logits are computed, in words."""
        return "float32"

    @property
    def n_bytes(self) -> int:
        """Memory beside the embedding itself."""
        return 0

    @property
    def bytes_per_token(self) -> int:
        """What is read for one sequence."""
        return self._wte_VC.nbytes

    def candidates(self, hidden_NC: Tensor, counts: Sequence[int | None]) -> list[Candidates]:
        """All tokens for each hidden state, see `OutputLayer`. On a CPU."""
        return [Candidates(torch.mv(self._wte_VC, hidden_C).numpy()) for hidden_C in hidden_NC]

    def all_logits(self, hidden_NC: Tensor) -> Tensor:
        """Logits (`n_rows`, V) on the device: first those of the N hidden states, then rows that mean nothing."""
        padded_RC = hidden_NC.new_zeros(self.n_rows, hidden_NC.shape[1])
        padded_RC[: len(hidden_NC)] = hidden_NC
        return self.logits(padded_RC)

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """Logits (R, V) on the device, with R = `n_rows`."""
        return torch.mm(hidden_RC, self._wte_VC.T)


class CompiledOutputLayer:
    """The output layer in compiled loops."""

    def __init__(self, wte_VC: Tensor) -> None:
        from nanomoe.generation.kernels.short_list import Embedding

        self._embedding = Embedding(wte_VC.numpy())

    @property
    def numerics(self) -> str:
        """How logits are computed, in words."""
        return "float32 for a short list found in int8" if self._embedding.has_ints else "float32"

    @property
    def n_bytes(self) -> int:
        """Memory beside the embedding itself."""
        return self._embedding.n_bytes

    @property
    def bytes_per_token(self) -> int:
        """What is read for one sequence where a short list is enough."""
        return self._embedding.searched_bytes

    def candidates(self, hidden_NC: Tensor, counts: Sequence[int | None]) -> list[Candidates]:
        """The candidates of each hidden state, see `OutputLayer`."""
        x_NC, n_threads = hidden_NC.numpy(), torch.get_num_threads()
        found: dict[int, Candidates] = {}
        few = [n for n, count in enumerate(counts) if count is not None]
        if few:
            lists = self._embedding.short_lists(_rows(x_NC, few), [counts[n] or 0 for n in few], n_threads)
            found = {n: Candidates(one[1], one[0]) for n, one in zip(few, lists, strict=True) if one is not None}
        rest = [n for n in range(len(counts)) if n not in found]
        if rest:
            logits_NV = self._embedding.logits(_rows(x_NC, rest), n_threads)
            found |= {n: Candidates(logits_V) for n, logits_V in zip(rest, logits_NV, strict=True)}
        return [found[n] for n in range(len(counts))]


def _rows(x_NC: "np.typing.NDArray[np.float32]", chosen: list[int]) -> "np.typing.NDArray[np.float32]":
    return x_NC if len(chosen) == len(x_NC) else x_NC[chosen]
