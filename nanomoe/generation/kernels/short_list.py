"""The logits of all tokens, or of the few that can be among the likeliest, in loops.

Every logit is the product of a hidden state with a token's embedding, summed over the channels in order, so it is the
same bits whether all are computed or one. To find the likeliest without computing all, the embedding is read in 8-bit
integers, a quarter of the bytes. Rounding moves a product by at most

    |x - x'| |w| + |x'| |w - w'|    (Cauchy-Schwarz)

and float32 sums of C terms by at most C 2**-24 / (1 - C 2**-24) |x| |w| (Higham, Accuracy and Stability, section 3.1).
Both are proved. So where any k tokens have float32 logits of at least t, a token whose 8-bit product says less than t
minus the two bounds is not among the k likeliest. Where 8-bit products have no instruction of their own, the float32
logits are themselves what is searched, with a bound of 0.

Shape letters: N rows, V vocabulary, C channels, P panels, l their lanes, Q = ceil(C / 4) quads of 8-bit channels, S
tokens of a list.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanomoe.compiling import Array, Floats, even_bounds, in_parts
from nanomoe.generation.kernels.compiling import HAS_INT8_PRODUCTS, Ids, compiled
from nanomoe.generation.kernels.panels import LANES, add_products, pack

_LONGEST = 4096
"""A longer list is not worth computing its logits one by one."""

_PANELS_AT_ONCE = 8
"""Panels whose products are made before their largest are sought: they stay in a core's nearest cache."""

_ROUNDING = 2.0**-24
_LEAST = 1e-30
"""Stands for the largest number of a row that is all zeros."""


class _Searched(NamedTuple):
    """The products of rows with an embedding, among which the likeliest tokens are searched."""

    products: Array
    """(N, P l): float32 logits, or the int32 products of 8-bit integers."""

    largest: Array
    """(N, P): the largest product of each panel."""

    unit: npt.NDArray[np.float64]
    """(N,): what turns products into logits."""

    bound: npt.NDArray[np.float64]
    """(N,): how far these can be from the float32 logits."""


class Embedding:
    """The embedding (V, C) as the loops read it."""

    def __init__(self, wte_VC: Floats) -> None:
        self._wte_VC = wte_VC
        self._panels = pack(wte_VC)
        V, C = wte_VC.shape
        P = len(self._panels)
        self._starts_Pl = np.zeros((P, LANES), np.float32)
        self._starts_Pl.reshape(-1)[V:] = -np.inf
        self._int_panels: Array | None = None
        self._products_NV = np.empty((0, 0), np.float32)
        if HAS_INT8_PRODUCTS:
            self._scale = max(np.abs(wte_VC).max().item(), _LEAST) / 127
            ints_VC = np.zeros((V, -(-C // 4) * 4), np.int8)
            ints_VC[:, :C] = np.rint(wte_VC / np.float32(self._scale))
            self._norm, self._rounding = _largest_norms(wte_VC, ints_VC, self._scale)
            self._int_panels = pack(ints_VC.view(np.int32))
            # Rows are stored +128 (unsigned), so 128 * sum(w) is subtracted in advance.
            self._int_starts_Pl = np.full((P, LANES), -(2**30), np.int32)
            self._int_starts_Pl.reshape(-1)[:V] = -128 * ints_VC.sum(axis=1, dtype=np.int32)

    @property
    def n_bytes(self) -> int:
        """Memory beside the embedding itself."""
        ints = 0 if self._int_panels is None else self._int_panels.nbytes
        return self._panels.nbytes + self._products_NV.nbytes + ints

    @property
    def has_ints(self) -> bool:
        """Whether short lists are sought by 8-bit products."""
        return self._int_panels is not None

    @property
    def searched_bytes(self) -> int:
        """What is read to find a short list."""
        return (self._panels if self._int_panels is None else self._int_panels).nbytes

    def logits(self, x_NC: Floats, n_threads: int) -> Floats:
        """(N, V), valid until the next call."""
        logits_NV, _ = self._multiply(x_NC, self._panels, self._starts_Pl, n_threads)
        return logits_NV[:, : len(self._wte_VC)]

    def short_lists(self, x_NC: Floats, counts: list[int], n_threads: int) -> list[tuple[Ids, Floats] | None]:
        """For each row, all tokens that may be among its `count` likeliest or equal to the last of them, rising, and
        their logits; None where they are too many to be worth a list."""
        N, C = x_NC.shape
        unit_N, bound_N = np.ones(N), np.zeros(N)
        if self._int_panels is None:
            products = self._multiply(x_NC, self._panels, self._starts_Pl, n_threads)
        else:
            rows_NC = np.full((N, self._int_panels.shape[1] * 4), 128, np.uint8)
            sum_rounding = C * _ROUNDING / (1 - C * _ROUNDING)
            _quantize(x_NC, self._scale, self._norm, self._rounding, sum_rounding, rows_NC, unit_N, bound_N)
            products = self._multiply(rows_NC.view(np.int32), self._int_panels, self._int_starts_Pl, n_threads)
        ids_NS, logits_NS = np.empty((N, _LONGEST), np.int64), np.empty((N, _LONGEST), np.float32)
        found_N = np.empty(N, np.int64)
        counts_N = np.minimum(counts, len(self._wte_VC))
        arguments = _Searched(*products, unit_N, bound_N), counts_N, x_NC, self._wte_VC, ids_NS, logits_NS, found_N
        in_parts(partial(_call_lists, arguments), even_bounds(N, n_threads))
        return [
            None if found < 0 else (ids_NS[n, :found], logits_NS[n, :found]) for n, found in enumerate(found_N.tolist())
        ]

    def _multiply(self, rows: Array, panels: Array, starts_Pl: Array, n_threads: int) -> tuple[Array, Array]:
        """Products (N, P l), valid until the next call, and the largest of each panel (N, P)."""
        N, P = len(rows), len(panels)
        if len(self._products_NV) < N:
            # Kept, because fresh pages for so large a result cost as much as the products (measured).
            self._products_NV = np.empty((N, P * LANES), np.float32)
        products_NV, largest_NP = self._products_NV[:N].view(rows.dtype), np.empty((N, P), rows.dtype)
        in_parts(partial(_call_multiply, (rows, panels, starts_Pl, products_NV, largest_NP)), even_bounds(P, n_threads))
        return products_NV, largest_NP


def _largest_norms(wte_VC: Floats, ints_VC: npt.NDArray[np.int8], scale: float) -> tuple[float, float]:
    """The largest norm of an embedding, and of what rounding to 8 bits changed in one."""
    norm = rounding = 0.0
    for first in range(0, len(wte_VC), _LONGEST):
        wide = wte_VC[first : first + _LONGEST].astype(np.float64)
        rounded = ints_VC[first : first + _LONGEST, : wte_VC.shape[1]] * scale
        norm = max(norm, float(np.linalg.norm(wide, axis=1).max()))
        rounding = max(rounding, float(np.linalg.norm(wide - rounded, axis=1).max()))
    return norm, rounding


def _call_multiply(arguments: tuple[object, ...], first: int, last: int) -> None:
    _multiply_panels(first, last, *arguments)


def _call_lists(arguments: tuple[object, ...], first: int, last: int) -> None:
    for n in range(first, last):
        _list_likeliest(n, *arguments)


@compiled
def _quantize(x_NC, scale, norm, rounding, sum_rounding, rows_NC, unit_N, bound_N):
    """Rows in 8-bit integers, 128 larger; what turns products into logits, and how far these are from float32's."""
    for n in range(len(x_NC)):
        x_C = x_NC[n]
        largest, squares, error_squares = _LEAST, 0.0, 0.0
        for c in range(len(x_C)):
            largest = max(largest, abs(np.float64(x_C[c])))
        unit = largest / 127
        for c in range(len(x_C)):
            x = np.float64(x_C[c])
            rounded = np.rint(x / unit)
            rows_NC[n, c] = np.uint8(rounded + 128)
            squares += x * x
            error_squares += (x - rounded * unit) ** 2
        x_norm, x_rounding = np.sqrt(squares), np.sqrt(error_squares)
        unit_N[n] = unit * scale
        bound = x_rounding * norm + (x_norm + x_rounding) * rounding + sum_rounding * x_norm * norm
        bound_N[n] = 1.0001 * bound  # what float64 itself rounds


@compiled
def _multiply_panels(first, last, rows, panels, starts_Pl, products_NV, largest_NP):
    N = len(rows)
    for begin in range(first, last, _PANELS_AT_ONCE):
        end = min(begin + _PANELS_AT_ONCE, last)
        for n in range(N):
            for p in range(begin, end):
                for lane in range(LANES):
                    products_NV[n, p * LANES + lane] = starts_Pl[p, lane]
        add_products(rows, N, panels, begin, end - begin, rows.shape[1], products_NV, begin * LANES)
        for n in range(N):
            for p in range(begin, end):
                largest = products_NV[n, p * LANES]
                for v in range(p * LANES + 1, (p + 1) * LANES):
                    largest = max(largest, products_NV[n, v])
                largest_NP[n, p] = largest


@compiled
def _reached(values, n, count):
    """A number that at least `count` of the first `n` values reach, the `count`-th largest or hardly below."""
    low, high = np.float64(values[0]), np.float64(values[0])
    for i in range(n):
        low, high = min(low, np.float64(values[i])), max(high, np.float64(values[i]))
    if count == 1:
        return high
    for _ in range(24):
        middle = (low + high) / 2
        n_reached = 0
        for i in range(n):
            n_reached += values[i] >= middle
        if n_reached >= count:
            low = middle
        else:
            high = middle
    return low


@compiled
def _tokens_from(searched, n, least, ids_S, values_S):
    """Tokens whose products are at least `least`, and these, up to as many as there is room for; their number."""
    found = 0
    for p in range(searched.largest.shape[1]):
        if searched.largest[n, p] >= least:
            for v in range(p * LANES, (p + 1) * LANES):
                if searched.products[n, v] >= least:
                    if found < len(ids_S):
                        ids_S[found], values_S[found] = v, searched.products[n, v]
                    found += 1
    return found


@compiled
def _keep_reaching(ids_S, values_S, n, least):
    """Move the first `n` tokens whose values are at least `least` to the front; their number."""
    kept = 0
    for s in range(n):
        if values_S[s] >= least:
            ids_S[kept], values_S[kept] = ids_S[s], values_S[s]
            kept += 1
    return kept


@compiled
def _exact_logits(x_C, wte_VC, ids_S, n, logits_S):
    """The float32 logits of `n` tokens, eight at a time because each sum has to wait for its last addition."""
    for begin in range(0, n, 8):
        last = n - 1
        w_0, w_1 = wte_VC[ids_S[begin]], wte_VC[ids_S[min(begin + 1, last)]]
        w_2, w_3 = wte_VC[ids_S[min(begin + 2, last)]], wte_VC[ids_S[min(begin + 3, last)]]
        w_4, w_5 = wte_VC[ids_S[min(begin + 4, last)]], wte_VC[ids_S[min(begin + 5, last)]]
        w_6, w_7 = wte_VC[ids_S[min(begin + 6, last)]], wte_VC[ids_S[min(begin + 7, last)]]
        t_0 = t_1 = t_2 = t_3 = t_4 = t_5 = t_6 = t_7 = np.float32(0)
        for c in range(len(x_C)):
            x = x_C[c]
            t_0 += x * w_0[c]
            t_1 += x * w_1[c]
            t_2 += x * w_2[c]
            t_3 += x * w_3[c]
            t_4 += x * w_4[c]
            t_5 += x * w_5[c]
            t_6 += x * w_6[c]
            t_7 += x * w_7[c]
        sums = (t_0, t_1, t_2, t_3, t_4, t_5, t_6, t_7)
        for s in range(begin, min(begin + 8, n)):
            logits_S[s] = sums[s - begin]


@compiled
def _list_likeliest(n, searched, counts_N, x_NC, wte_VC, ids_NS, logits_NS, found_N):
    count, P = counts_N[n], searched.largest.shape[1]
    found_N[n] = -1
    if count > P or not np.isfinite(searched.bound[n]):  # float32 overflowed
        return
    ids_S, logits_S, values_S = ids_NS[n], logits_NS[n], np.empty(_LONGEST, searched.products.dtype)
    # At least `count` tokens reach what the largest of `count` panels do.
    found = _tokens_from(searched, n, _reached(searched.largest[n], P, count), ids_S, values_S)
    if not count <= found <= _LONGEST:  # less, where float32 overflowed
        return
    least = _reached(values_S, found, count)
    if searched.bound[n] == 0:
        found = _keep_reaching(ids_S, values_S, found, least)
        for s in range(found):
            logits_S[s] = values_S[s]
    else:
        # The float32 logits of the `count` likeliest by their products: no other of the `count` likeliest is below.
        kept = _keep_reaching(ids_S, values_S, found, least)
        _exact_logits(x_NC[n], wte_VC, ids_S, kept, logits_S)
        least = (_reached(logits_S, kept, count) - searched.bound[n]) / searched.unit[n]
        found = _tokens_from(searched, n, least, ids_S, values_S)
        if not count <= found <= _LONGEST:
            return
        _exact_logits(x_NC[n], wte_VC, ids_S, found, logits_S)
        found = _keep_reaching(ids_S, logits_S, found, _reached(logits_S, found, count))
    found_N[n] = found
