"""Tokens on a GPU as captured CUDA graphs: one replay computes and chooses several tokens of every sequence, each from
the one before, and the host reads their ids once.

A graph has fixed shapes and addresses: it computes all rows of the cache, whether they are in use or not. What differs
from one replay to the next lies in tensors that are overwritten before it; what was captured is a number of tokens and
a kind of choice (`device_sampling.Kind`), one program each.

Shape letters: R rows of the decoder's cache, S tokens of each, P = 4 numbers that say how to choose, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanomoe.config import SamplingConfig
from nanomoe.cuda_graphs import Graphs, Program
from nanomoe.generation import device_sampling
from nanomoe.generation.decoder import TensorDecoder
from nanomoe.generation.device_sampling import Kind, Rules
from nanomoe.generation.output_layer import TensorOutputLayer

TOKENS_AT_ONCE = 8
"""Most tokens that a replay adds to a sequence. Reading ids back costs the host about what a token of a small model
costs the device; with eight tokens it is an eighth of that. Assumed."""


class Newest(NamedTuple):
    """A sequence whose keys and values are cached up to its newest token."""

    row: int
    """Row of the cache."""

    token: int
    """The newest token."""

    position: int
    """Its position, below block_size."""

    sampling: SamplingConfig
    """How the tokens after it are chosen."""

    uniforms: Sequence[float]
    """Numbers in [0, 1), one for each token that is wanted, at least one; so many tokens fit the cache."""


@dataclass(frozen=True)
class _Captured:
    program: Program
    logits_RV: Tensor
    """The logits of the last token, overwritten by each replay."""


class TokenGraphs:
    """What adds tokens to all cached sequences at once."""

    def __init__(self, decoder: TensorDecoder, output: TensorOutputLayer, graphs: Graphs) -> None:
        """`decoder`: computes the tokens of all rows in one shape."""
        self._decoder, self._output, self._graphs = decoder, output, graphs
        R, device = output.n_rows, decoder.device
        self._given_GR = torch.zeros(len(Rules.NAMES) + TOKENS_AT_ONCE + 2, R, dtype=torch.float64, device=device)
        """How to choose, uniform numbers, newest tokens, their positions: together, so that one copy sends them."""
        self._chosen_SR = torch.zeros(TOKENS_AT_ONCE, R, dtype=torch.int64, device=device)
        self._programs: dict[tuple[int, Kind], _Captured] = {}

    def add(self, sequences: Sequence[Newest]) -> list[list[int]]:
        """The next tokens of each sequence, as many as it has uniform numbers; `device_sampling.NOT_FINITE` where there
        is none."""
        n_tokens = max(len(one.uniforms) for one in sequences)
        captured = self._replay(sequences, 1 if n_tokens == 1 else TOKENS_AT_ONCE)
        self._logits_RV = captured.logits_RV
        chosen = self._chosen_SR[:n_tokens].tolist()
        return [[of_rows[one.row] for of_rows in chosen[: len(one.uniforms)]] for one in sequences]

    def logits(self, row: int) -> Tensor:
        """Logits (V,) of a sequence's last token, after `add` of one token; valid until the next call of `add`."""
        return self._logits_RV[row]

    def _replay(self, sequences: Sequence[Newest], n_tokens: int) -> _Captured:
        R = self._output.n_rows
        newest_2R = torch.zeros(2, R, dtype=torch.float64)
        uniforms_SR = torch.zeros(TOKENS_AT_ONCE, R, dtype=torch.float64)
        samplings = [SamplingConfig(temperature=0)] * R
        for one in sequences:
            newest_2R[:, one.row] = torch.tensor([one.token, one.position])
            uniforms_SR[: len(one.uniforms), one.row] = torch.tensor(one.uniforms, dtype=torch.float64)
            samplings[one.row] = one.sampling
        rules = Rules(samplings, self._output.vocab_size)
        self._given_GR.copy_(torch.cat([rules.numbers_PN, uniforms_SR, newest_2R]))
        captured = self._programs.get((n_tokens, rules.kind))
        if captured is None:
            captured = self._programs[n_tokens, rules.kind] = self._capture(n_tokens, rules.kind)
        captured.program.replay()
        return captured

    def _capture(self, n_tokens: int, kind: Kind) -> _Captured:
        made: list[Tensor] = []
        program = self._graphs.capture(lambda: made.append(self._add(n_tokens, kind)))
        return _Captured(program, made[-1])

    def _add(self, n_tokens: int, kind: Kind) -> Tensor:
        """What a replay does. Returns the logits (R, V) of the last token."""
        rules_PR, uniforms_SR, newest_2R = self._given_GR.split([len(Rules.NAMES), TOKENS_AT_ONCE, 2])
        tokens_R, positions_R = newest_2R.long()
        for n in range(n_tokens):
            logits_RV = self._output.logits(self._decoder.advance(torch.stack([tokens_R, positions_R])))
            chosen_R = device_sampling.choose(logits_RV, rules_PR, uniforms_SR[n], kind)
            self._chosen_SR[n].copy_(chosen_R)
            # Where nothing could be chosen, and beyond what is wanted of a sequence, it only has to stay in bounds.
            tokens_R = chosen_R.clamp(min=0)
            positions_R = (positions_R + 1).clamp(max=self._decoder.config.block_size - 1)
        return logits_RV
