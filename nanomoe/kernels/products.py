"""Products of 8-bit rows with an 8-bit table, by the instruction that AVX-512 VNNI has for them.

`vpdpbusd` multiplies 64 unsigned bytes with 64 signed ones and adds each four products to one of 16 sums. No loop that
numba compiles becomes that instruction, so the innermost loop is written in LLVM's terms: a tile is a group of `GROUP`
tokens times a few rows, whose sums stay in registers while the channels go by.

Most products are never looked at again once the largest of their group is known, and writing them out took as long as
making them. So only the largest is kept, and `read_group` makes a group's products anew. Where there is no such
instruction, torch makes the products, all are kept, and `read_group` reads them.

Shape letters: N rows, V vocabulary, C channels, G groups, T tokens of a group, Q bytes of a group's channels.
"""

from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nanomoe.kernels import compiled, compiled_parallel, use_threads

Ints = npt.NDArray[np.int8]
Sums = npt.NDArray[np.int32]

GROUP = 32
"""Tokens whose largest product is kept: two vectors of 16 sums."""

_LANES = 16
_NOBODY = -(2**30)
"""The product of a token that only fills the last group: below any other."""

_GROUPS_AT_ONCE = 32
"""Groups that a thread takes together: their part of the table stays in a core's cache for all rows."""

_VECTOR = ir.VectorType(ir.IntType(32), _LANES)


def has_instruction() -> bool:
    """Whether what numba compiles may use the instruction."""
    features: str | None = numba.config.CPU_FEATURES  # type: ignore[attr-defined] # set by numba at run time
    if features is not None:
        return "+avx512vnni" in features
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni", False))


class Products(NamedTuple):
    """The products of N rows, as loops read them; valid until the next ones are made."""

    largest: Sums
    """(N, G): of each group."""

    kept: Sums
    """(N, V), or (N, 0) where they are made anew."""

    rows: npt.NDArray[np.uint8]
    """(N, C): the rows, each number 128 larger."""

    table: Ints
    """(G, Q): see `Table`."""

    starts: Sums
    """(G, T): what sums begin with."""


class Table:
    """An 8-bit matrix (V, C), laid out as the instruction reads it: by group, by four channels, by token."""

    def __init__(self, ints_VC: Ints) -> None:
        V, C = ints_VC.shape
        G, quads = -(-V // GROUP), -(-C // 4)
        padded = np.zeros((G * GROUP, quads * 4), np.int8)
        padded[:V, :C] = ints_VC
        self._table_GQ = np.ascontiguousarray(padded.reshape(G, GROUP, quads, 4).swapaxes(1, 2)).reshape(G, -1)
        # What the 128 that is added to the rows' numbers adds to the sums is taken off them before.
        self._starts_GT = -128 * padded.sum(axis=1, dtype=np.int32).reshape(G, GROUP)
        self._starts_GT.reshape(-1)[V:] = _NOBODY
        self._n_channels = quads * 4
        self._all_NV = np.empty((0, 0), np.int32)

    @property
    def n_bytes(self) -> int:
        """Memory of the table, and of what is kept for the next call."""
        return int(self._table_GQ.nbytes + self._starts_GT.nbytes + self._all_NV.nbytes)

    def products(self, ints_NC: Ints) -> Products:
        """The largest of each group, and what the others are made from."""
        rows_NC = self._unsigned(ints_NC)
        largest_NG = np.empty((len(ints_NC), len(self._starts_GT)), np.int32)
        use_threads(len(ints_NC))
        _find_largest(rows_NC, self._table_GQ, self._starts_GT, largest_NG)
        return Products(largest_NG, np.empty((len(ints_NC), 0), np.int32), rows_NC, self._table_GQ, self._starts_GT)

    def all_products(self, ints_NC: Ints) -> Sums:
        """(N, V padded to whole groups), valid until the next call."""
        if len(self._all_NV) < len(ints_NC):
            # Kept, because fresh pages for so large a result cost as much as the products (measured).
            self._all_NV = np.empty((len(ints_NC), self._starts_GT.size), np.int32)
        all_NV = self._all_NV[: len(ints_NC)]
        use_threads(len(ints_NC))
        _multiply(self._unsigned(ints_NC), self._table_GQ, self._starts_GT, all_NV)
        return all_NV

    def _unsigned(self, ints_NC: Ints) -> npt.NDArray[np.uint8]:
        N, C = ints_NC.shape
        rows_NC = np.zeros((N, self._n_channels), np.uint8)
        np.bitwise_xor(ints_NC.view(np.uint8), 0x80, out=rows_NC[:, :C])
        return rows_NC


def kept_products(products_NV: Sums) -> Products:
    """Products that something else has made."""
    N, V = products_NV.shape
    largest_NG = np.empty((N, -(-V // GROUP)), np.int32)
    use_threads(N)
    _find_largest_of_kept(products_NV, largest_NG)
    return Products(
        largest_NG, products_NV, np.empty((N, 0), np.uint8), np.empty((0, 0), np.int8), np.empty((0, 0), np.int32)
    )


@compiled_parallel
def _find_largest_of_kept(products_NV, largest_NG):
    for n in numba.prange(len(products_NV)):
        for g in range(largest_NG.shape[1]):
            largest_NG[n, g] = _largest(products_NV[n, g * GROUP : (g + 1) * GROUP])


@compiled
def _largest(products):
    largest = np.int32(_NOBODY)
    for i in range(len(products)):
        largest = max(largest, products[i])
    return largest


def _tile(n_rows: int, *, largest_only: bool) -> Any:
    """The function that multiplies `n_rows` rows from `row` on with one group, and puts the sums, or the largest of
    them, into `out` from (at_row, at_column) on."""

    @intrinsic
    def tile(
        context: Any, rows_NC: Any, row: Any, table_GQ: Any, group: Any, starts_GT: Any, out: Any, at_row: Any,
        at_column: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            def array(place: int) -> _Array:
                return _Array(context, builder, signature.args[place], values[place])

            def plus(number: Any, more: int) -> Any:
                return builder.add(number, ir.Constant(number.type, more))

            rows, row, table, group, starts = array(0), values[1], array(2), values[3], array(4)
            out, at_row, at_column = array(5), values[6], values[7]
            parts = range(GROUP // _LANES)
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in parts] for _ in range(n_rows)]
            for part in parts:
                start = starts.load(_VECTOR, group, 4 * _LANES * part)
                for of_row in sums:
                    builder.store(start, of_row[part])
            multiply = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.x86.avx512.vpdpbusd.512"
            )
            n_quads = builder.sdiv(table.width, ir.Constant(table.width.type, 4 * GROUP))
            with cgutils.for_range(builder, n_quads) as quad:
                weights = [table.load(_VECTOR, group, 4 * _LANES * part, (quad.index, 4 * GROUP)) for part in parts]
                for r, of_row in enumerate(sums):
                    four = rows.load(ir.IntType(32), plus(row, r), 0, (quad.index, 4))
                    first = builder.insert_element(_VECTOR(ir.Undefined), four, ir.Constant(ir.IntType(32), 0))
                    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
                    everywhere = builder.shuffle_vector(first, _VECTOR(ir.Undefined), lanes)
                    for part in parts:
                        total = builder.call(multiply, [builder.load(of_row[part]), everywhere, weights[part]])
                        builder.store(total, of_row[part])
            compare = ir.FunctionType(ir.IntType(32), [_VECTOR])
            reduce = cgutils.get_or_insert_function(builder.module, compare, "llvm.vector.reduce.smax.v16i32")
            for r, of_row in enumerate(sums):
                totals = [builder.load(total) for total in of_row]
                if largest_only:
                    greater = builder.select(builder.icmp_signed(">", *totals), *totals)
                    out.store(builder.call(reduce, [greater]), plus(at_row, r), 0, (at_column, 4))
                else:
                    for part in parts:
                        out.store(totals[part], plus(at_row, r), 4 * _LANES * part, (at_column, 4))
            return context.get_dummy_value()

        return types.void(rows_NC, row, table_GQ, group, starts_GT, out, at_row, at_column), generate

    return tile


class _Array:
    """A contiguous (rows, columns) array in generated code."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: types.Array, value: Any) -> None:
        array = context.make_array(kind)(context, builder, value=value)
        self._builder = builder
        self._data = builder.bitcast(array.data, cgutils.voidptr_t)
        self._row_bytes, _ = cgutils.unpack_tuple(builder, array.strides)
        _, self.width = cgutils.unpack_tuple(builder, array.shape)

    def load(self, kind: ir.Type, row: Any, offset: int, times: tuple[Any, int] | None = None) -> Any:
        """What lies in `row`, `offset` bytes plus a number times so many bytes after its begin."""
        return self._builder.load(self._at(kind, row, offset, times), align=1)

    def store(self, value: Any, row: Any, offset: int, times: tuple[Any, int] | None = None) -> None:
        """Put a value where `load` would find it."""
        self._builder.store(value, self._at(value.type, row, offset, times), align=1)

    def _at(self, kind: ir.Type, row: Any, offset: int, times: tuple[Any, int] | None) -> Any:
        builder = self._builder
        place = builder.add(builder.mul(row, self._row_bytes), ir.Constant(self._row_bytes.type, offset))
        if times is not None:
            number, n_bytes = times
            place = builder.add(place, builder.mul(number, ir.Constant(place.type, n_bytes)))
        return builder.bitcast(builder.gep(self._data, [place]), kind.as_pointer())


_largest_of_8, _largest_of_4, _largest_of_1 = (_tile(n_rows, largest_only=True) for n_rows in (8, 4, 1))
_sums_of_8, _sums_of_1 = (_tile(n_rows, largest_only=False) for n_rows in (8, 1))


@compiled_parallel
def _find_largest(rows_NC, table_GQ, starts_GT, largest_NG):
    N, G = largest_NG.shape
    for part in numba.prange((G + _GROUPS_AT_ONCE - 1) // _GROUPS_AT_ONCE):
        groups = range(part * _GROUPS_AT_ONCE, min((part + 1) * _GROUPS_AT_ONCE, G))
        row = 0
        while row + 8 <= N:
            for group in groups:
                _largest_of_8(rows_NC, row, table_GQ, group, starts_GT, largest_NG, row, group)
            row += 8
        if row + 4 <= N:
            for group in groups:
                _largest_of_4(rows_NC, row, table_GQ, group, starts_GT, largest_NG, row, group)
            row += 4
        while row < N:
            for group in groups:
                _largest_of_1(rows_NC, row, table_GQ, group, starts_GT, largest_NG, row, group)
            row += 1


@compiled_parallel
def _multiply(rows_NC, table_GQ, starts_GT, all_NV):
    N, G = len(rows_NC), len(table_GQ)
    for part in numba.prange((G + _GROUPS_AT_ONCE - 1) // _GROUPS_AT_ONCE):
        groups = range(part * _GROUPS_AT_ONCE, min((part + 1) * _GROUPS_AT_ONCE, G))
        row = 0
        while row + 8 <= N:
            for group in groups:
                _sums_of_8(rows_NC, row, table_GQ, group, starts_GT, all_NV, row, group * GROUP)
            row += 8
        while row < N:
            for group in groups:
                _sums_of_1(rows_NC, row, table_GQ, group, starts_GT, all_NV, row, group * GROUP)
            row += 1


# Decided when this is imported: code with the instruction in it cannot be compiled for a processor without.
if has_instruction():

    @compiled
    def read_group(products, n, group, out_1T):
        """The products of row n with one group, into (1, T)."""
        _sums_of_1(products.rows, n, products.table, group, products.starts, out_1T, 0, 0)

else:

    @compiled
    def read_group(products, n, group, out_1T):
        """The products of row n with one group, into (1, T)."""
        kept_V = products.kept[n, group * GROUP : (group + 1) * GROUP]
        out_1T[0, len(kept_V) :] = _NOBODY
        out_1T[0, : len(kept_V)] = kept_V
