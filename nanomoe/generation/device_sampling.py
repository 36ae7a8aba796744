"""How the next tokens of many sequences are chosen on the device that computes their logits: all at once, and only the
chosen ones are copied from it. `nanomoe.generation.sampling` says by which rule, and chooses one after another.

Sums are float64 and taken in an order that depends on the shape alone, where torch's own running sum on a GPU would not
promise the same twice. Rounded otherwise than the rule's, they could choose another token where a uniform number lies
within some 1e-15 of the border between two.

Shape letters: N sequences, V vocabulary, P = 4 numbers that say how to choose, B blocks of W tokens.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.config import SamplingConfig
from nanomoe.generation.sampling import OVERFLOW

_BLOCK = 256
"""Tokens whose running sum is one matrix product."""

NOT_FINITE = -1
"""What is chosen where the largest logit is not a finite number."""


class Kind(NamedTuple):
    """What has to be computed to choose the tokens of a batch: the same operators for all batches of a kind."""

    draws: bool
    """Whether any token is drawn; the likeliest is taken of all otherwise."""

    n_likeliest: int
    """How many of the likeliest tokens are looked for, because some `top_k` cuts the others off; 0 where none does."""

    has_top_p: bool
    """Whether any `top_p` cuts tokens off."""


class Rules:
    """How the tokens of a batch are to be chosen."""

    NAMES = ("temperature", "top_k", "top_p", "takes the likeliest")

    def __init__(self, samplings: Sequence[SamplingConfig], vocab_size: int) -> None:
        """One sampling for each sequence."""
        top_ks = [min(one.top_k or vocab_size, vocab_size) for one in samplings]
        top_ps = [1.0 if one.top_p is None else one.top_p for one in samplings]
        drawn = [n for n, one in enumerate(samplings) if not one.greedy]
        longest = max((top_ks[n] for n in drawn if top_ks[n] < vocab_size), default=0)
        self.kind = Kind(
            draws=bool(drawn),
            # The next power of two, so that there are few kinds.
            n_likeliest=min(1 << (longest - 1).bit_length(), vocab_size) if longest else 0,
            has_top_p=any(top_ps[n] < 1 for n in drawn),
        )
        temperatures = [1.0 if one.greedy else one.temperature for one in samplings]
        are_greedy = [float(one.greedy) for one in samplings]
        self.numbers_PN = torch.tensor([temperatures, top_ks, top_ps, are_greedy], dtype=torch.float64)
        """On the CPU, float64: `NAMES` by sequences."""


def choose(logits_NV: Tensor, numbers_PN: Tensor, uniform_N: Tensor, kind: Kind) -> Tensor:
    """The next tokens (N,), int64; `NOT_FINITE` where there is none. Can be captured as a CUDA graph.

    Args:
        logits_NV: float32.
        numbers_PN: `Rules.numbers_PN`, on the device of the logits.
        uniform_N: numbers in [0, 1), float64, on that device.
        kind: `Rules.kind`.
    """
    best_N1 = logits_NV.argmax(-1, keepdim=True)
    largest_N1 = logits_NV.gather(-1, best_N1)
    chosen_N: Tensor = best_N1[:, 0]
    if kind.draws:
        is_greedy_N = numbers_PN[3] > 0
        chosen_N = chosen_N.where(is_greedy_N, _drawn(logits_NV, largest_N1, numbers_PN, uniform_N, kind))
    return chosen_N.masked_fill(~largest_N1[:, 0].isfinite(), NOT_FINITE)


def _drawn(logits_NV: Tensor, largest_N1: Tensor, numbers_PN: Tensor, uniform_N: Tensor, kind: Kind) -> Tensor:
    temperature_N, top_k_N, top_p_N, _ = numbers_PN
    V = logits_NV.shape[1]

    def scaled(logits: Tensor) -> Tensor:
        result: Tensor = (logits.double() - largest_N1.double()) / temperature_N[:, None]
        return result

    scaled_NV = scaled(logits_NV)
    allowed_NV: Tensor | None = None
    if kind.n_likeliest or kind.has_top_p:
        falling = scaled(logits_NV.topk(V if kind.has_top_p else kind.n_likeliest).values)
        least_N1 = falling.gather(-1, (top_k_N.long()[:, None] - 1).clamp(max=falling.shape[1] - 1))
        # Not `where` with a number, which would be copied to the device: a capture refuses that.
        least_N1 = least_N1.masked_fill(top_k_N[:, None] >= V, -torch.inf)
        if kind.has_top_p:
            sums = RunningSum(falling.exp() * (falling >= least_N1))
            # A token is allowed if those before it hold less than top_p.
            last_N = sums.first(top_p_N * sums.total_N, reached=True)
            least_by_p_N1 = falling.gather(-1, last_N[:, None]).masked_fill(top_p_N[:, None] >= 1, -torch.inf)
            least_N1 = torch.maximum(least_N1, least_by_p_N1)
        allowed_NV = scaled_NV >= least_N1
    weights_NV = scaled_NV.exp()
    if allowed_NV is not None:
        weights_NV = weights_NV * allowed_NV
    sums = RunningSum(weights_NV)
    # Rounding can lift the target to the sum itself: then the last token with a weight.
    target_N = torch.minimum(uniform_N * sums.total_N, sums.total_N.nextafter(torch.zeros_like(sums.total_N)))
    return sums.first(target_N, reached=False)


def choose_all(logits_NV: Tensor, samplings: Sequence[SamplingConfig], uniforms: Sequence[float]) -> list[int]:
    """The next token of each sequence, see `choose`.

    Raises:
        ValueError: the largest logit of some sequence is not a finite number.
    """
    rules, device = Rules(samplings, logits_NV.shape[1]), logits_NV.device
    uniform_N = torch.tensor(uniforms, dtype=torch.float64, device=device)
    tokens: list[int] = choose(logits_NV, rules.numbers_PN.to(device), uniform_N, rules.kind).tolist()
    if NOT_FINITE in tokens:
        raise ValueError(OVERFLOW)
    return tokens


class RunningSum:
    """The running sums of weights that are not negative, in blocks."""

    def __init__(self, weights_NV: Tensor) -> None:
        """`weights_NV`: float64."""
        self._blocks_NBW = F.pad(weights_NV, (0, -weights_NV.shape[1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
        self._totals_NB = self._blocks_NBW.sum(-1)
        n_blocks = self._totals_NB.shape[1]
        self._through_NB = self._totals_NB @ _upper(n_blocks, weights_NV.device)
        self.total_N = self._through_NB[:, -1]
        """Sum of all weights."""

    def first(self, target_N: Tensor, *, reached: bool) -> Tensor:
        """The first place with a weight at which the running sum is above the target, or with `reached` at least it;
        the last place with a weight where rounding keeps all sums below."""

        def place(sums: Tensor, weights: Tensor) -> Tensor:
            before = sums < target_N[:, None] if reached else sums <= target_N[:, None]
            places = torch.arange(sums.shape[1], device=sums.device)
            return before.sum(-1).minimum((places * (weights > 0)).amax(-1))

        block_N1 = place(self._through_NB, self._totals_NB)[:, None]
        before_N1 = self._through_NB.gather(-1, block_N1) - self._totals_NB.gather(-1, block_N1)
        inside_NW = self._blocks_NBW.gather(1, block_N1[..., None].expand(-1, 1, _BLOCK))[:, 0]
        sums_NW = before_N1 + inside_NW @ _upper(_BLOCK, target_N.device)
        return block_N1[:, 0] * _BLOCK + place(sums_NW, inside_NW)


@functools.cache  # few and small, and for good: captured graphs read them where they lie
def _upper(n: int, device: torch.device) -> Tensor:
    """Ones on and above the diagonal: a product with it sums up what stands before and in each column."""
    return torch.ones(n, n, dtype=torch.float64, device=device).triu_()
