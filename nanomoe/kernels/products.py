"""Products of 8-bit rows with an 8-bit table, by the instruction that AVX-512 VNNI has for them.

`vpdpbusd` multiplies 64 unsigned bytes with 64 signed ones and adds each four products to one of 16 sums. No loop that
numba compiles becomes that instruction, so the innermost loop is written in LLVM's terms: a tile is a group of `GROUP`
tokens times a few rows, whose sums stay in registers while the channels go by. `torch._int_mm` does the same; it reads
the table through more steps, and leaves the largest of each group to be found in a second reading.

Shape letters: N rows, V vocabulary, C channels, G groups, Q quads of channels.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nanomoe.kernels import compiled, compiled_parallel, use_threads

Ints = npt.NDArray[np.int8]
Products = npt.NDArray[np.int32]

GROUP = 32
"""Tokens whose largest product is kept: two vectors of 16 sums."""

_LANES = 16
_NOBODY = -(2**30)
"""The product of a token that only fills the last group: below any other."""

_GROUPS_AT_ONCE = 32
"""Groups that a thread takes together: their part of the table stays in a core's cache for all rows."""

_VECTOR = ir.VectorType(ir.IntType(32), _LANES)


def has_instruction() -> bool:
    """Whether this processor has the instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni", False))


class Table:
    """An 8-bit matrix (V, C), laid out as the instruction reads it."""

    def __init__(self, ints_VC: Ints) -> None:
        V, C = ints_VC.shape
        G, Q = -(-V // GROUP), -(-C // 4)
        padded = np.zeros((G * GROUP, Q * 4), np.int8)
        padded[:V, :C] = ints_VC
        by_tile = padded.reshape(G, GROUP // _LANES, _LANES, Q, 4).transpose(0, 3, 1, 2, 4)
        self._table_GQ = np.ascontiguousarray(by_tile).reshape(G, Q * 4 * GROUP)
        # The rows' integers are made unsigned by adding 128 to each: what that adds to the sums is taken off them.
        self._starts_GT = -128 * padded.sum(axis=1, dtype=np.int32).reshape(G, GROUP)
        self._starts_GT.reshape(-1)[V:] = _NOBODY
        self._n_channels = Q * 4
        self._products_NV = np.empty((0, 0), np.int32)
        self._largest_NG = np.empty((0, 0), np.int32)

    @property
    def n_bytes(self) -> int:
        """Memory of the table, and of the products that are kept for the next call."""
        return sum(array.nbytes for array in (self._table_GQ, self._starts_GT, self._products_NV, self._largest_NG))

    def products(self, ints_NC: Ints) -> tuple[Products, Products]:
        """(N, V padded to whole groups) products, and (N, G) the largest of each group; valid until the next call."""
        N, C = ints_NC.shape
        if len(self._products_NV) < N:
            # Kept, because fresh pages for so large a result cost as much as the products (measured).
            self._products_NV = np.empty((N, self._starts_GT.size), np.int32)
            self._largest_NG = np.empty((N, len(self._starts_GT)), np.int32)
        unsigned_NC = np.zeros((N, self._n_channels), np.uint8)
        unsigned_NC[:, :C] = ints_NC.view(np.uint8) ^ 0x80
        products_NV, largest_NG = self._products_NV[:N], self._largest_NG[:N]
        use_threads(N)
        _multiply(unsigned_NC, self._table_GQ, self._starts_GT, products_NV, largest_NG)
        return products_NV, largest_NG


def largest_of_groups(products_NV: Products) -> Products:
    """(N, G): the largest product of each group, of products that something else has computed."""
    N, V = products_NV.shape
    largest_NG = np.empty((N, -(-V // GROUP)), np.int32)
    use_threads(N)
    _find_largest(products_NV, largest_NG)
    return largest_NG


@compiled_parallel
def _find_largest(products_NV, largest_NG):
    for n in numba.prange(len(products_NV)):
        for g in range(largest_NG.shape[1]):
            largest_NG[n, g] = _largest(products_NV[n, g * GROUP : (g + 1) * GROUP])


@compiled
def _largest(products):
    largest = np.int32(-(2**31))
    for i in range(len(products)):
        largest = max(largest, products[i])
    return largest


def _tile(n_rows: int) -> Any:
    """The function that computes a tile of `n_rows` rows from `row` on, times one group."""

    @intrinsic
    def tile(
        context: Any, x_NC: Any, row: Any, table_GQ: Any, group: Any, starts_GT: Any, products_NV: Any, largest_NG: Any
    ) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            def array(place: int) -> _Array:
                return _Array(context, builder, signature.args[place], values[place])

            x, row, table, group, starts, products, largest = (
                array(0), values[1], array(2), values[3], array(4), array(5), array(6)
            )  # fmt: skip
            parts = range(GROUP // _LANES)
            rows = [builder.add(row, ir.Constant(row.type, r)) for r in range(n_rows)]
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in parts] for _ in rows]
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
                for r, of_row in zip(rows, sums, strict=True):
                    four = x.load(ir.IntType(32), r, 0, (quad.index, 4))
                    first = builder.insert_element(_VECTOR(ir.Undefined), four, ir.Constant(ir.IntType(32), 0))
                    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
                    everywhere = builder.shuffle_vector(first, _VECTOR(ir.Undefined), lanes)
                    for part in parts:
                        total = builder.call(multiply, [builder.load(of_row[part]), everywhere, weights[part]])
                        builder.store(total, of_row[part])
            compare = ir.FunctionType(ir.IntType(32), [_VECTOR])
            reduce = cgutils.get_or_insert_function(builder.module, compare, "llvm.vector.reduce.smax.v16i32")
            for r, of_row in zip(rows, sums, strict=True):
                totals = [builder.load(total) for total in of_row]
                for part in parts:
                    products.store(totals[part], r, 4 * _LANES * part, (group, 4 * GROUP))
                greater = builder.select(builder.icmp_signed(">", *totals), *totals)
                largest.store(builder.call(reduce, [greater]), r, 0, (group, 4))
            return context.get_dummy_value()

        return types.void(x_NC, row, table_GQ, group, starts_GT, products_NV, largest_NG), generate

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


_tile_of_8, _tile_of_4, _tile_of_1 = _tile(8), _tile(4), _tile(1)


@compiled_parallel
def _multiply(x_NC, table_GQ, starts_GT, products_NV, largest_NG):
    N, G = largest_NG.shape
    for part in numba.prange((G + _GROUPS_AT_ONCE - 1) // _GROUPS_AT_ONCE):
        groups = range(part * _GROUPS_AT_ONCE, min((part + 1) * _GROUPS_AT_ONCE, G))
        row = 0
        while row + 8 <= N:
            for group in groups:
                _tile_of_8(x_NC, row, table_GQ, group, starts_GT, products_NV, largest_NG)
            row += 8
        if row + 4 <= N:
            for group in groups:
                _tile_of_4(x_NC, row, table_GQ, group, starts_GT, products_NV, largest_NG)
            row += 4
        while row < N:
            for group in groups:
                _tile_of_1(x_NC, row, table_GQ, group, starts_GT, products_NV, largest_NG)
            row += 1
