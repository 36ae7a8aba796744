"""Products of rows with panels of a matrix, whose sums have one order whatever the number of rows.

A panel holds `LANES` outputs of a matrix: for each input in turn, the outputs' numbers side by side. A tile multiplies
a few rows with a few panels: the sums stay in registers while the inputs go by, from the first to the last, so each
sum's order is that of the source, and a row's result is the same bits beside any others. Numba has no vector type and
LLVM does not find this form by itself, so the tile is written in LLVM's terms. Elements are 4 bytes wide: a float32, or
four 8-bit integers, which AVX-512 VNNI multiplies and adds in one instruction.

Shape letters: N rows, I inputs, O outputs, P panels, L = `LANES`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nanomoe.compiling import Array
from nanomoe.generation.kernels.compiling import HAS_WIDE_VECTORS, compiled

LANES = 32
"""Outputs of a panel: two vectors of 16."""

ROWS = 4 if HAS_WIDE_VECTORS else 2
"""Rows of a tile: as many as leave every sum in a register."""

_VECTOR = 16
_PANELS = 4
"""Panels of a tile of a single row: enough sums to hide how long an addition takes."""


def padded(n_outputs: int) -> int:
    """Outputs with those that only fill the last panel."""
    return -(-n_outputs // LANES) * LANES


def pack(weight: Array) -> Array:
    """(..., P, I, L): the panels of matrices (..., O, I), filled up with zeros."""
    *many, n_outputs, n_inputs = weight.shape
    filled = np.zeros((*many, padded(n_outputs), n_inputs), weight.dtype)
    filled[..., :n_outputs, :] = weight
    panels: Array = np.ascontiguousarray(
        filled.reshape(*many, padded(n_outputs) // LANES, LANES, n_inputs).swapaxes(-1, -2)
    )
    return panels


def _tile(n_rows: int, n_panels: int) -> Any:
    """The function that adds the products of rows `row` and following with panels `panel` and following, of their first
    `n_inputs` inputs, to `y` from (at_row, at_column) on."""

    @intrinsic
    def tile(
        context: Any, x_NI: Any, row: Any, w_PIL: Any, panel: Any, n_inputs: Any, y_NO: Any, at_row: Any, at_column: Any
    ) -> Any:
        is_float = x_NI.dtype == types.float32
        element = ir.FloatType() if is_float else ir.IntType(32)
        vector = ir.VectorType(element, _VECTOR)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            def array(place: int) -> Any:
                return context.make_array(signature.args[place])(context, builder, value=values[place])

            def element_at(array: Any, kind: ir.Type, *places: Any) -> Any:
                """The address of an element, by one number for each dimension."""
                strides = cgutils.unpack_tuple(builder, array.strides)
                offset = builder.mul(places[0], strides[0])
                for place, stride in zip(places[1:], strides[1:], strict=True):
                    offset = builder.add(offset, builder.mul(place, stride))
                start = builder.bitcast(array.data, cgutils.voidptr_t)
                return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())

            def plus(number: Any, more: int) -> Any:
                return builder.add(number, ir.Constant(number.type, more))

            x, w, y = array(0), array(2), array(5)
            row, panel, n, at_row, at_column = values[1], values[3], values[4], values[6], values[7]
            halves = [(p, half) for p in range(n_panels) for half in range(LANES // _VECTOR)]
            sums = {}
            for r in range(n_rows):
                for p, half in halves:
                    place = element_at(y, vector, plus(at_row, r), plus(at_column, LANES * p + _VECTOR * half))
                    sums[r, p, half] = (place, cgutils.alloca_once(builder, vector))
                    builder.store(builder.load(place, align=4), sums[r, p, half][1])
            name = "llvm.fma.v16f32" if is_float else "llvm.x86.avx512.vpdpbusd.512"
            multiply_add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
            zero = ir.Constant(ir.IntType(32), 0)
            with cgutils.for_range(builder, n) as loop:
                weights = {
                    (p, half): builder.load(
                        element_at(w, vector, plus(panel, p), loop.index, ir.Constant(panel.type, _VECTOR * half)),
                        align=4,
                    )
                    for p, half in halves
                }
                for r in range(n_rows):
                    one = builder.load(element_at(x, element, plus(row, r), loop.index), align=4)
                    first = builder.insert_element(vector(ir.Undefined), one, zero)
                    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _VECTOR), [0] * _VECTOR)
                    everywhere = builder.shuffle_vector(first, vector(ir.Undefined), lanes)
                    for p, half in halves:
                        total = sums[r, p, half][1]
                        factors = [everywhere, weights[p, half]]
                        terms = [*factors, builder.load(total)] if is_float else [builder.load(total), *factors]
                        builder.store(builder.call(multiply_add, terms), total)
            for place, total in sums.values():
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        index = types.intp
        return types.void(x_NI, index, w_PIL, index, index, y_NO, index, index), generate

    return tile


_tile_of_rows, _tile_of_panels, _tile_of_one = _tile(ROWS, 1), _tile(1, _PANELS), _tile(1, 1)


@compiled
def add_products(x_NI, n, w_PIL, first_panel, n_panels, n_inputs, y_NO, at):
    """y += x w: the first `n` rows with `n_panels` panels from `first_panel` on, of `n_inputs` inputs. The outputs of
    the first of these panels are at column `at` of `y`."""
    if n == 1:
        panel = 0
        while panel + _PANELS <= n_panels:
            _tile_of_panels(x_NI, 0, w_PIL, first_panel + panel, n_inputs, y_NO, 0, at + panel * LANES)
            panel += _PANELS
        while panel < n_panels:
            _tile_of_one(x_NI, 0, w_PIL, first_panel + panel, n_inputs, y_NO, 0, at + panel * LANES)
            panel += 1
        return
    for panel in range(n_panels):
        row = 0
        while row + ROWS <= n:
            _tile_of_rows(x_NI, row, w_PIL, first_panel + panel, n_inputs, y_NO, row, at + panel * LANES)
            row += ROWS
        while row < n:
            _tile_of_one(x_NI, row, w_PIL, first_panel + panel, n_inputs, y_NO, row, at + panel * LANES)
            row += 1
