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
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from nanomoe.sampling import BLOCK, TIE, Floats, Ids, Noise, Sampling

if TYPE_CHECKING:
    from nanomoe.kernels.products import Products, Table

Ints = npt.NDArray[np.int8]
Sums = npt.NDArray[np.int32]

_BLOCK = 32
"""Logits whose maximum is taken first when the largest are sought: every (V / 32)-th, which vectorises."""

_SHORT_LIST = 16
"""Tokens whose float32 logits decide which is the likeliest."""

_SMALL_BYTES = 2**19
"""Float32 embeddings of at most this size stay in a core's cache, and a short list gains nothing. Assumed; 4 MiB gain a
factor of two (measured)."""

_LONGEST_LIST = 4096
"""A list that would have to be longer is not worth its logits, one by one."""

_EXACT_ROWS = 4096
"""Embeddings that are widened to float64 at a time."""

_LEAST = 1e-30
"""Stands for the largest number of a row that is all zeros."""


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
    """Of each row."""

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
        self._ints: _Int8 | None = None
        if wte_VC.nbytes > _SMALL_BYTES and _has_fast_ints(wte_VC.device) and _torch_is_exact(wte_VC.shape[1]):
            self._ints = _Int8(wte_VC, compiled=compiled)
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
        return [largest * (self._hidden_error + self._relative_rounding * norm) for norm in _norms(x_NC)]

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


class _Int8:
    """The embedding in 8-bit integers, all of one scale, so that products compare as they are."""

    def __init__(self, wte_VC: Tensor, *, compiled: bool) -> None:
        self._scale = max(wte_VC.abs().max().item(), _LEAST) / 127
        ints_VC = (wte_VC / self._scale).round_().to(torch.int8)
        self._largest_norm: float = wte_VC.norm(dim=1).max().item()
        self._largest_error: float = (wte_VC - ints_VC * self._scale).norm(dim=1).max().item()
        self._wte = wte_VC.numpy()
        self._table = _compiled_table(ints_VC) if compiled else _TorchTable(ints_VC)
        self._padded_V = -(-len(wte_VC) // _BLOCK) * _BLOCK
        self._logits_NV = wte_VC.new_empty(0, 0)

    @property
    def table_bytes(self) -> int:
        return self._wte.size

    @property
    def n_bytes(self) -> int:
        return self._table.n_bytes + self._logits_NV.nbytes

    def logits(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V padded to whole blocks with -inf), valid until the next call, each row's in a unit of its own (N,)."""
        N, V = len(x_NC), len(self._wte)
        if len(self._logits_NV) < N:
            self._logits_NV = x_NC.new_full((N, self._padded_V), -math.inf)
        units_N1 = x_NC.abs().amax(1, keepdim=True).clamp_min_(_LEAST) / 127
        products_NV = self._table.all_products((x_NC / units_N1).round_().to(torch.int8).numpy())
        self._logits_NV[:N, :V].copy_(torch.from_numpy(products_NV)[:, :V])
        return self._logits_NV[:N], units_N1[:, 0] * self._scale

    def errors(self, x_NC: Tensor) -> list[float]:
        """For each row, a bound on the error of any of its logits."""
        units_N1 = x_NC.abs().amax(1, keepdim=True).clamp_min_(_LEAST) / 127
        roundings = _norms(x_NC - (x_NC / units_N1).round_() * units_N1)
        return [self._bound(norm, rounding) for norm, rounding in zip(_norms(x_NC), roundings, strict=True)]

    def _bound(self, norm: float, rounding: float) -> float:
        return 1.001 * (rounding * self._largest_norm + (norm + rounding) * self._largest_error)

    def likeliest(self, x_NC: Tensor, errors: list[float]) -> list[int | None]:
        """As `OutputLayer.likeliest`, in compiled loops."""
        from nanomoe.kernels import short_list

        products, units, bounds = self._products(x_NC)
        gaps = [2 * error + TIE for error in errors]
        slacks = [(2 * bound + gap) / unit for bound, gap, unit in zip(bounds, gaps, units, strict=True)]
        return short_list.likeliest(products, np.array(slacks), np.array(gaps), x_NC.numpy(), self._wte)

    def draw(
        self, x_NC: Tensor, errors: list[float], samplings: Sequence[Sampling], noises: Sequence[Noise]
    ) -> list[int | None]:
        """As `OutputLayer.draw`."""
        from nanomoe.kernels import draw

        products, units, bounds = self._products(x_NC)
        V = len(self._wte)
        rows = draw.Rows(
            units=np.array(units),
            rough_errors=np.add(bounds, errors),
            errors=np.array(errors),
            top_k=np.array([V if sampling.top_k is None else min(sampling.top_k, V) for sampling in samplings]),
            temperature=np.array([sampling.temperature for sampling in samplings]),
            uniform=np.stack([noise.uniform for noise in noises]),
            x=x_NC.numpy(),
        )
        return draw.draw(products, rows, self._wte)

    def _products(self, x_NC: Tensor) -> tuple["Products", list[float], list[float]]:
        """The products of the rows' integers with the embedding's; for each row, what turns them into logits, and how
        far these can be from those of its hidden state."""
        from nanomoe.kernels import products, short_list

        ints_NC, units_N, norms_N, roundings_N = short_list.quantize(x_NC.numpy())
        bounds = [self._bound(*each) for each in zip(norms_N.tolist(), roundings_N.tolist(), strict=True)]
        units = (units_N * self._scale).tolist()
        if isinstance(self._table, _TorchTable):
            return products.kept_products(self._table.all_products(ints_NC)), units, bounds
        return self._table.products(ints_NC), units, bounds


class _TorchTable:
    """An 8-bit matrix (V, C) and torch's products with it; `nanomoe.kernels.products.Table` is its compiled twin."""

    def __init__(self, ints_VC: Tensor) -> None:
        self._ints_VC = ints_VC
        self._products_NV = ints_VC.new_empty((0, 0), dtype=torch.int32)

    @property
    def n_bytes(self) -> int:
        return self._ints_VC.nbytes + self._products_NV.nbytes

    def all_products(self, ints_NC: Ints) -> Sums:
        """(N, V), valid until the next call."""
        N = len(ints_NC)
        if len(self._products_NV) < N:
            # Kept, because fresh pages for so large a result cost as much as the products (measured).
            self._products_NV = self._ints_VC.new_empty((N, len(self._ints_VC)), dtype=torch.int32)
        rows_NC = torch.from_numpy(ints_NC)
        return torch._int_mm(rows_NC, self._ints_VC.T, out=self._products_NV[:N]).numpy()


def _compiled_table(ints_VC: Tensor) -> "Table | _TorchTable":
    """The compiled twin, where this processor has the instruction for it."""
    from nanomoe.kernels import products

    return products.Table(ints_VC.numpy()) if products.has_instruction() else _TorchTable(ints_VC)


def _torch_is_exact(n_embd: int) -> bool:
    """Whether torch's 8-bit products are right on this machine where intermediate sums are largest."""
    ints_VC = torch.full((64, n_embd), 127, dtype=torch.int8)
    ints_VC[1::2] = -127
    table = _TorchTable(ints_VC)
    rows = (np.full((n, n_embd), 127, np.int8) for n in (1, 4))
    return all((np.abs(table.all_products(ints_NC)) == 127 * 127 * n_embd).all() for ints_NC in rows)


def _norms(x_NC: Tensor) -> list[float]:
    norms: list[float] = torch.linalg.vector_norm(x_NC, dim=1).tolist()
    return norms


def _largest(logits_NV: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` largest of each row, and where they are. They lie in the `size` blocks of the largest maxima."""
    N, V = logits_NV.shape
    size = min(size, V)
    if V % _BLOCK or size * _BLOCK > V:
        values, ids = logits_NV.topk(size)
        return values, ids
    blocks = logits_NV.view(N, _BLOCK, -1)
    chosen_NS = blocks.amax(1).topk(size).indices
    values_NS, at_NS = blocks.gather(2, chosen_NS[:, None].expand(-1, _BLOCK, -1)).flatten(1).topk(size)
    return values_NS, at_NS // size * (V // _BLOCK) + chosen_NS.gather(1, at_NS % size)


def _lower_bounds(logits_NV: Tensor, count: int) -> Tensor:
    """(N, at most `count`), falling: the n-th is at most the n-th largest logit of its row. Block maxima, if enough."""
    N, V = logits_NV.shape
    if V % _BLOCK == 0 and count * _BLOCK <= V:
        return logits_NV.view(N, _BLOCK, -1).amax(1).topk(count).values
    return logits_NV.topk(min(count, V)).values


def _has_fast_ints(device: torch.device) -> bool:
    """Whether 8-bit products are known to be faster: seven times for one row, four for 32 (measured, AVX-512)."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
