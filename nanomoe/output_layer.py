"""From hidden states to logits, reading as little of the embedding as an exact answer needs.

The output layer is most of the cost of a token: V rows of C numbers. `likeliest` and `candidates` read them as 8-bit
integers, a quarter of the bytes, take a short list, and compute the logits of those few in float32; `draw` samples so,
and `rough` gives the 8-bit logits of all. Rounding to 8 bits moves a logit by at most |x - x'| |w| + |x'| |w - w'|
(Cauchy-Schwarz), so a list whose end lies further below than that misses nobody. Where a machine gets 8-bit products
wrong (some saturate), or is not known to be faster with them, all is float32.

Shape letters: N rows, S candidates, V vocabulary, C channels. What temperatures and noise mean is left to
`nanomoe.sampling` and the loops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.int8 import STRIPES, Int8Embedding, norms, pays_in_8_bits
from nanomoe.sampling import BLOCK, TIE, Floats, Ids, Noise, Sampling

_SHORT_LIST = 16
"""Tokens whose float32 logits decide which is the likeliest."""

_SMALL_BYTES = 2**19
"""Float32 embeddings of at most this size stay in a core's cache, and a short list gains nothing. Assumed; 4 MiB gain a
factor of two (measured)."""

_LONGEST_LIST = 4096
"""A list that would have to be longer is not worth its logits, one by one."""

_EXACT_ROWS = 4096
"""Embeddings that are widened to float64 at a time."""


@dataclass(frozen=True)
class Candidates:
    """Tokens among which the likeliest ones of a row are."""

    ids: Ids
    """(S,), rising."""

    logits: Floats
    """(S,) float32."""


@dataclass(frozen=True)
class Rough:
    """Logits of all tokens from 8-bit products, valid until the next ones are computed."""

    logits: Floats
    """(N, V), each row in units of its own."""

    units: list[float]
    """Unit of each row."""

    bounds: list[float]
    """On the error of each row's logits, given its hidden state."""

    _x_NC: Tensor
    _wte_VC: Tensor

    def block(self, n: int, block: int) -> Floats:
        """The float32 logits of row n for the tokens of one block of `sampling.BLOCK` ids."""
        return torch.mv(self._wte_VC[block * BLOCK : (block + 1) * BLOCK], self._x_NC[n]).numpy()


class OutputLayer:
    """The tied embedding as output layer: logits_V = W_VC x_C."""

    def __init__(self, wte_VC: Tensor, hidden_error: float, *, compiled: bool = False) -> None:
        """`hidden_error`: bound on the norm of the error of the hidden states that will be given. `compiled`: whether
        short lists are sought, and tokens drawn, by compiled loops (`nanomoe.kernels`)."""
        self._wte_VC = wte_VC
        self._wte_CV = wte_VC.T.contiguous()  # products with one row read it several times faster (measured)
        norms_V = wte_VC.norm(dim=1)
        self._largest_norm = norms_V.max().item()
        self._relative_rounding = wte_VC.shape[1] * 2.0**-24
        self._hidden_error = hidden_error
        self._ints: Int8Embedding | None = None
        if wte_VC.nbytes > _SMALL_BYTES and pays_in_8_bits(wte_VC):
            self._ints = Int8Embedding(wte_VC, compiled=compiled)
        self._compiled = compiled

    @property
    def numerics(self) -> str:
        """How a token is computed, in words."""
        if self._ints is None:
            return "float32, certified against float64"
        return "int8, then float32 where that does not decide, certified against float64"

    @property
    def n_bytes(self) -> int:
        """Memory beside the embedding itself."""
        return self._wte_CV.nbytes + (0 if self._ints is None else self._ints.n_bytes)

    @property
    def bytes_per_token(self) -> int:
        """What is read for one row where a short list decides."""
        return self._wte_CV.nbytes if self._ints is None else self._ints.table_bytes

    def errors(self, x_NC: Tensor) -> list[float]:
        """For each row, a bound on the error of any float32 logit."""
        largest = self._largest_norm
        return [largest * (self._hidden_error + self._relative_rounding * norm) for norm in norms(x_NC)]

    def logits(self, x_NC: Tensor) -> Tensor:
        """(N, V), float32."""
        return torch.mm(x_NC, self._wte_CV)

    def exact(self, x_C: Tensor, ids_S: Tensor | None = None) -> Tensor:
        """(V,) float64 logits of a float64 hidden state, or (S,) those of some tokens."""
        wte_SC = self._wte_VC if ids_S is None else self._wte_VC[ids_S]
        return torch.cat([part_SC.double() @ x_C for part_SC in torch.split(wte_SC, _EXACT_ROWS)])

    def rough(self, x_NC: Tensor) -> Rough | None:
        """The logits of all tokens from 8-bit products; None where these gain nothing."""
        if self._ints is None:
            return None
        logits_NV, units_N = self._ints.logits(x_NC)
        return Rough(
            logits_NV[:, : len(self._wte_VC)].numpy(), units_N.tolist(), self._ints.errors(x_NC), x_NC, self._wte_VC
        )

    def likeliest(self, x_NC: Tensor, errors: list[float]) -> list[int | None]:
        """The likeliest token of each row; None where another one is so close that float32 cannot tell. `errors`:
        those of `errors()`."""
        if self._ints is not None and self._compiled:
            return self._ints.likeliest(x_NC, errors)
        if self._ints is None:
            logits_NS, ids_NS = self.logits(x_NC).topk(min(2, len(self._wte_VC)))
            missed = [-math.inf] * len(x_NC)  # the largest logit that a token outside of the list can have
        else:
            rough_NV, units_N = self._ints.logits(x_NC)
            rough_NS, ids_NS = _largest(rough_NV, _SHORT_LIST)
            logits_NS = torch.bmm(F.embedding(ids_NS, self._wte_VC), x_NC[:, :, None])[..., 0]
            ends = (rough_NS[:, -1] * units_N).tolist()
            missed = [end + bound for end, bound in zip(ends, self._ints.errors(x_NC), strict=True)]
        best_N2, at_N2 = logits_NS.topk(min(2, logits_NS.shape[1]))
        ids = ids_NS.gather(1, at_N2[:, :1])[:, 0].tolist()
        return [
            token if best - max([*rivals, end]) > 2 * error + TIE else None
            for token, (best, *rivals), end, error in zip(ids, best_N2.tolist(), missed, errors, strict=True)
        ]

    @property
    def draws(self) -> bool:
        """Whether there is `draw`."""
        return self._ints is not None and self._compiled

    def draw(
        self, x_NC: Tensor, errors: list[float], samplings: Sequence[Sampling], noises: Sequence[Noise]
    ) -> list[int | None]:
        """The sampled token of each row; None where the bounds do not decide. `errors`: those of `errors()`;
        `samplings`: none that is greedy or cuts by mass."""
        assert self._ints is not None
        return self._ints.draw(x_NC, errors, samplings, noises)

    def candidates(self, x_NC: Tensor, counts: list[int], errors: list[float]) -> list[Candidates | None]:
        """For each row, all tokens that may be among its `count` likeliest or equal to them; None where they are too
        many to be worth a list. `errors`: those of `errors()`."""
        V = len(self._wte_VC)
        counts = [min(count, V) for count in counts]
        if self._ints is None:
            rough_NV, units, bounds = self.logits(x_NC), [1.0] * len(x_NC), [0.0] * len(x_NC)
        else:
            rough_NV, units_N = self._ints.logits(x_NC)
            units, bounds = units_N.tolist(), self._ints.errors(x_NC)
        enough_NS = _lower_bounds(rough_NV, max(counts)).tolist()
        rough = rough_NV.cpu().numpy()[:, :V]
        found: list[Candidates | None] = []
        for n, count in enumerate(counts):
            slack = 2 * bounds[n] + 4 * errors[n] + TIE
            ids = np.flatnonzero(rough[n] >= enough_NS[n][min(count, len(enough_NS[n])) - 1] - slack / units[n])
            if not 0 < len(ids) <= _LONGEST_LIST:  # none, where float32 overflowed
                found.append(None)
            elif self._ints is None:
                found.append(Candidates(ids, rough[n, ids]))
            else:
                rows_SC = F.embedding(torch.from_numpy(ids), self._wte_VC)
                found.append(Candidates(ids, torch.mv(rows_SC, x_NC[n]).numpy()))
        return found


def _largest(logits_NV: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` largest of each row, and where they are. They lie in the `size` blocks of the largest maxima."""
    N, V = logits_NV.shape
    size = min(size, V)
    if V % STRIPES or size * STRIPES > V:
        values, ids = logits_NV.topk(size)
        return values, ids
    blocks = logits_NV.view(N, STRIPES, -1)
    chosen_NS = blocks.amax(1).topk(size).indices
    values_NS, at_NS = blocks.gather(2, chosen_NS[:, None].expand(-1, STRIPES, -1)).flatten(1).topk(size)
    return values_NS, at_NS // size * (V // STRIPES) + chosen_NS.gather(1, at_NS % size)


def _lower_bounds(logits_NV: Tensor, count: int) -> Tensor:
    """(N, at most `count`), falling: the n-th is at most the n-th largest logit of its row. Block maxima, if enough."""
    N, V = logits_NV.shape
    if V % STRIPES == 0 and count * STRIPES <= V:
        return logits_NV.view(N, STRIPES, -1).amax(1).topk(count).values
    return logits_NV.topk(min(count, V)).values
