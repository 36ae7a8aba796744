"""The embedding in 8-bit integers: its products with hidden states, and how far these can be from the exact logits.

Rounding to 8 bits moves a logit by at most |x - x'| |w| + |x'| |w - w'| (Cauchy-Schwarz). The products are torch's, or
those of `nanomoe.kernels.products`, which also finds tokens from them without a tensor operation.

Shape letters: N rows, V vocabulary, C channels.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanomoe.sampling import TIE, Noise, Sampling

if TYPE_CHECKING:
    from nanomoe.kernels.products import Products, Table

Ints = npt.NDArray[np.int8]
Sums = npt.NDArray[np.int32]

STRIPES = 32
"""Logits come in so many stripes of equal length, the last filled up: the largest of every (V / 32)-th, vectorises."""

LEAST = 1e-30
"""Stands for the largest number of a row that is all zeros."""


def pays_in_8_bits(wte_VC: Tensor) -> bool:
    """Whether 8-bit products are known to be faster here, and right."""
    return _has_fast_ints(wte_VC.device) and _torch_is_exact(wte_VC.shape[1])


class Int8Embedding:
    """The embedding in 8-bit integers, all of one scale, so that products compare as they are."""

    def __init__(self, wte_VC: Tensor, *, compiled: bool) -> None:
        self._scale = max(wte_VC.abs().max().item(), LEAST) / 127
        ints_VC = (wte_VC / self._scale).round_().to(torch.int8)
        self._largest_norm: float = wte_VC.norm(dim=1).max().item()
        self._largest_error: float = (wte_VC - ints_VC * self._scale).norm(dim=1).max().item()
        self._wte = wte_VC.numpy()
        self._table = _compiled_table(ints_VC) if compiled else _TorchTable(ints_VC)
        self._padded_V = -(-len(wte_VC) // STRIPES) * STRIPES
        self._logits_NV = wte_VC.new_empty(0, 0)

    @property
    def table_bytes(self) -> int:
        """What is read of it for one row: a byte a number."""
        return self._wte.size

    @property
    def n_bytes(self) -> int:
        """Memory of the table, and of what is kept for the next call."""
        return self._table.n_bytes + self._logits_NV.nbytes

    def logits(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V padded to whole blocks with -inf), valid until the next call, each row's in a unit of its own (N,)."""
        N, V = len(x_NC), len(self._wte)
        if len(self._logits_NV) < N:
            self._logits_NV = x_NC.new_full((N, self._padded_V), -math.inf)
        units_N1 = x_NC.abs().amax(1, keepdim=True).clamp_min_(LEAST) / 127
        products_NV = self._table.all_products((x_NC / units_N1).round_().to(torch.int8).numpy())
        self._logits_NV[:N, :V].copy_(torch.from_numpy(products_NV)[:, :V])
        return self._logits_NV[:N], units_N1[:, 0] * self._scale

    def errors(self, x_NC: Tensor) -> list[float]:
        """For each row, a bound on the error of any of its logits."""
        units_N1 = x_NC.abs().amax(1, keepdim=True).clamp_min_(LEAST) / 127
        roundings = norms(x_NC - (x_NC / units_N1).round_() * units_N1)
        return [self._bound(norm, rounding) for norm, rounding in zip(norms(x_NC), roundings, strict=True)]

    def _bound(self, norm: float, rounding: float) -> float:
        return 1.001 * (rounding * self._largest_norm + (norm + rounding) * self._largest_error)

    def likeliest(self, x_NC: Tensor, errors: list[float]) -> list[int | None]:
        """`OutputLayer.likeliest` in compiled loops."""
        from nanomoe.kernels import short_list

        products, units, bounds = self._products(x_NC)
        gaps = [2 * error + TIE for error in errors]
        slacks = [(2 * bound + gap) / unit for bound, gap, unit in zip(bounds, gaps, units, strict=True)]
        return short_list.likeliest(products, np.array(slacks), np.array(gaps), x_NC.numpy(), self._wte)

    def draw(
        self, x_NC: Tensor, errors: list[float], samplings: Sequence[Sampling], noises: Sequence[Noise]
    ) -> list[int | None]:
        """`OutputLayer.draw` in compiled loops."""
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


def norms(x_NC: Tensor) -> list[float]:
    """The Euclidean norm of each row."""
    found: list[float] = torch.linalg.vector_norm(x_NC, dim=1).tolist()
    return found


def _has_fast_ints(device: torch.device) -> bool:
    """Whether 8-bit products are known to be faster: seven times for one row, four for 32 (measured, AVX-512)."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
