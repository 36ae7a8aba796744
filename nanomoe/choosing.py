"""The next tokens of several sequences, from their hidden states, by the cheapest logits that decide.

Knows no request and no cache: what is sought is told by `nanomoe.sampling`, what logits cost by the output layer.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nanomoe.output_layer import OutputLayer
from nanomoe.sampling import Floats, Ids, Noise, Sampling, choose, choose_among_blocks

_LONGEST_SHORT_LIST = 1024
"""A larger top_k is sampled from all logits."""


class Choosing:
    """One round of choosing the next token of several sequences, by the cheapest logits that decide."""

    def __init__(
        self,
        output: OutputLayer,
        hidden_NC: Tensor,
        samplings: Sequence[Sampling],
        noises: Sequence[Noise | None],
        *,
        wants_logits: Sequence[bool],
    ) -> None:
        """`noises`: of those that are sampled. `wants_logits`: whose probabilities are asked for."""
        self._output = output
        self._hidden_NC = hidden_NC
        self._samplings = samplings
        self._noises = noises
        self._errors = output.errors(hidden_NC)
        self._candidates: dict[int, Ids] = {}
        """The tokens that can be meant, of those sequences for which they are few."""
        self.tokens: list[int | None] = [None] * len(samplings)
        """The next token of each sequence; None where float32 does not decide."""
        self.logits: dict[int, Floats] = {}
        """All logits of the sequences whose probabilities are asked for."""

        greedy, drawn, few, all_ = [], [], [], []
        for n, sampling in enumerate(samplings):
            if wants_logits[n]:
                all_.append(n)
            elif sampling.greedy:
                greedy.append(n)
            elif output.draws and not sampling.cuts_by_mass:
                drawn.append(n)
            elif sampling.top_k is not None and sampling.top_k <= _LONGEST_SHORT_LIST:
                few.append(n)
            else:
                all_.append(n)
        self._likeliest(greedy)
        self._draw(drawn)
        self._among_candidates(few)
        self._roughly([n for n in all_ if not wants_logits[n]])
        self._among_all(
            [n for n in greedy + drawn + few + all_ if self.tokens[n] is None and n not in self._candidates]
        )

    def _rows(self, chosen: list[int]) -> tuple[Tensor, list[float]]:
        every = chosen == list(range(len(self._samplings)))
        return self._hidden_NC if every else self._hidden_NC[chosen], [self._errors[n] for n in chosen]

    def _likeliest(self, chosen: list[int]) -> None:
        if chosen:
            for n, token in zip(chosen, self._output.likeliest(*self._rows(chosen)), strict=True):
                self.tokens[n] = token

    def _among_candidates(self, chosen: list[int]) -> None:
        """Choose among the likeliest tokens of each sequence, where these are few."""
        if not chosen:
            return
        hidden_NC, errors = self._rows(chosen)
        counts = [self._samplings[n].top_k or 1 for n in chosen]
        found = self._output.candidates(hidden_NC, counts, errors)
        for n, candidates, error in zip(chosen, found, errors, strict=True):
            if candidates is not None:
                self._candidates[n] = candidates.ids
                self.tokens[n] = self._choose(n, candidates.logits, error, candidates.ids)

    def _draw(self, chosen: list[int]) -> None:
        """Sample tokens from what 8-bit products tell, where that decides."""
        if chosen:
            hidden_NC, errors = self._rows(chosen)
            samplings = [self._samplings[n] for n in chosen]
            noises = [noise for n in chosen if (noise := self._noises[n]) is not None]
            for n, token in zip(chosen, self._output.draw(hidden_NC, errors, samplings, noises), strict=True):
                self.tokens[n] = token

    def _among_all(self, chosen: list[int]) -> None:
        """Choose among all tokens by their float32 logits."""
        if chosen:
            hidden_NC, errors = self._rows(chosen)
            logits_NV = self._output.logits(hidden_NC).cpu().numpy()
            self._choose_each(chosen, logits_NV, errors)
            self.logits.update(zip(chosen, logits_NV, strict=True))

    def _roughly(self, chosen: list[int]) -> None:
        """Choose among all tokens by 8-bit logits, where these are to be had and decide."""
        if not chosen:
            return
        hidden_NC, errors = self._rows(chosen)
        rough = self._output.rough(hidden_NC)
        if rough is None:
            return
        for i, n in enumerate(chosen):
            sampling, noise = self._samplings[n], self._noises[n]
            unit, bound, error = rough.units[i], rough.bounds[i] + errors[i], errors[i]
            if sampling.allows_all and noise is not None:
                self.tokens[n] = choose_among_blocks(
                    rough.logits[i], unit, bound, partial(rough.block, i), error, sampling.temperature, noise
                )
            else:
                self.tokens[n] = self._choose(n, rough.logits[i] * unit, bound)

    def _choose_each(self, chosen: list[int], logits_NV: Floats, errors: list[float]) -> None:
        for i, n in enumerate(chosen):
            self.tokens[n] = self._choose(n, logits_NV[i], errors[i])

    def _choose(self, n: int, logits: Floats, error: float, ids: Ids | None = None) -> int | None:
        return choose(logits, self._samplings[n], self._noises[n], ids=ids, error=error)

    def decide_exactly(self, n: int, exact_C: Tensor, *, trust_candidates: bool) -> int:
        """The token by the float64 hidden state. `trust_candidates`: whether the rounded one was within its error."""
        ids = self._candidates.get(n) if trust_candidates else None
        ids_S = None if ids is None else torch.from_numpy(ids).to(exact_C.device)
        logits = self._output.exact(exact_C, ids_S).cpu().numpy()
        token = self._choose(n, logits, 0.0, ids)
        assert token is not None, "exact logits decide"
        if ids is None:
            self.logits[n] = logits
        return token
