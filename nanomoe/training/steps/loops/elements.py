"""Functions of one element, which the loops inline: numbers of 16 bits, exp, GELU and the dropout's hash."""

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from nanomoe.compiling import Array
from nanomoe.float32_functions import ERF_EVEN, ERF_ODD, EXP_POWERS, LN_2_HIGH, LN_2_LOW
from nanomoe.model.dropout import FIRST_FACTOR, ROW_SHIFT, SECOND_FACTOR
from nanomoe.training.steps.loops.compiling import compiled

_ONE = np.float32(1)
_HALF = np.float32(0.5)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_DENSITY = np.float32(1 / math.sqrt(2 * math.pi))
_SIXTEEN = np.uint32(16)
_FIFTEEN = np.uint32(15)
_LOW_HALF = np.uint32(0xFFFF)
_BIT_15 = np.uint32(0x8000)
_BELOW_HALF = np.uint32(0x7FFF)
_BIT_0 = np.uint32(1)
_ROW_SHIFT = np.uint32(ROW_SHIFT)
_FIRST = np.uint32(FIRST_FACTOR)
_SECOND = np.uint32(SECOND_FACTOR)


@compiled
def widened(bits: np.uint16) -> np.float32:
    """The float32 of a bfloat16's bits."""
    number: np.float32 = np.uint32(np.uint32(bits) << _SIXTEEN).view(np.float32)
    return number


@compiled
def narrowed(number: np.float32) -> np.uint16:
    """The bits of the nearest bfloat16, ties to even, as torch rounds."""
    bits = np.float32(number).view(np.uint32)
    return np.uint16(np.uint32(bits + _BELOW_HALF + ((bits >> _SIXTEEN) & _BIT_0)) >> _SIXTEEN)


def get(array: Array, row: int, column: int) -> np.float32:
    """An element as float32, of an array of float32 or of bfloat16's bits."""
    number: np.float32 = widened(array[row, column]) if array.dtype == np.uint16 else array[row, column]
    return number


def put(array: Array, row: int, column: int, number: np.float32) -> None:
    """Store a float32 into an array of float32 or of bfloat16's bits."""
    array[row, column] = narrowed(number) if array.dtype == np.uint16 else number


# In a loop the type of the array chooses, not a branch. numba wants the names and annotations of the implementation to
# be those of the function that chooses it.
@overload(get, inline="always")
def _get(array: Any, row: Any, column: Any) -> Any:
    def widen(array: Any, row: Any, column: Any) -> Any:
        return widened(array[row, column])

    def plain(array: Any, row: Any, column: Any) -> Any:
        return array[row, column]

    return widen if array.dtype == types.uint16 else plain


@overload(put, inline="always")
def _put(array: Any, row: Any, column: Any, number: Any) -> Any:
    def narrow(array: Any, row: Any, column: Any, number: Any) -> Any:
        array[row, column] = narrowed(number)

    def plain(array: Any, row: Any, column: Any, number: Any) -> Any:
        array[row, column] = number

    return narrow if array.dtype == types.uint16 else plain


_SIGN_SHIFT = np.int32(31)
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)


@compiled
def ordered(x: np.float32) -> np.int32:
    """An integer that is larger where `x` is larger, and larger than all for NaN: what lets the largest number of a row
    be found in vectors."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ (np.int32(bits >> _SIGN_SHIFT) & _ALL_BUT_SIGN))


@compiled
def unordered(key: np.int32) -> np.float32:
    """The number that `ordered` made this integer of."""
    number: np.float32 = np.int32(key ^ (np.int32(key >> _SIGN_SHIFT) & _ALL_BUT_SIGN)).view(np.float32)
    return number


_LOG2_E = np.float32(1.44269504088896341)
_LEAST = np.float32(-87)
_MOST = np.float32(88)
_E2, _E3, _E4, _E5, _E6, _E7 = EXP_POWERS


@compiled
def exp(x: np.float32) -> np.float32:
    """e to the x in float32, to 1e-7 of it; x below -87 counts as -87, above 88 as 88. NaN stays NaN."""
    x = _LEAST if x < _LEAST else x
    x = _MOST if x > _MOST else x
    n = np.floor(np.float32(x * _LOG2_E + _HALF))
    r = x - n * LN_2_HIGH - n * LN_2_LOW
    p = ((((_E7 * r + _E6) * r + _E5) * r + _E4) * r + _E3) * r + _E2
    power: np.float32 = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32((p * r * r + r + _ONE) * power)


_FOUR = np.float32(4)
_A1, _A3, _A5, _A7, _A9, _A11, _A13 = ERF_ODD
_B0, _B2, _B4, _B6, _B8 = ERF_EVEN


@compiled
def normal_cdf(u: np.float32) -> np.float32:
    """The standard normal distribution function, (1 + erf(u / sqrt(2))) / 2."""
    x = u * _SQRT_HALF
    x = -_FOUR if x < -_FOUR else x
    x = _FOUR if x > _FOUR else x
    s = x * x
    above = (((((_A13 * s + _A11) * s + _A9) * s + _A7) * s + _A5) * s + _A3) * s + _A1
    below = (((_B8 * s + _B6) * s + _B4) * s + _B2) * s + _B0
    return np.float32(_HALF + _HALF * x * above / below)


@compiled
def normal_density(u: np.float32) -> np.float32:
    """The density of the standard normal distribution."""
    return np.float32(_DENSITY * exp(-_HALF * u * u))


@compiled
def hashed(low: np.uint32, high: np.uint32, row: int, word: int) -> np.uint32:
    """The dropout's hash of a row and a word of it, which is two columns, under a plane's key of these words."""
    x = np.uint32(low + np.uint32((np.uint32(row) << _ROW_SHIFT) + np.uint32(word)))
    x = np.uint32(np.uint32((x ^ (x >> _SIXTEEN)) * _FIRST) ^ high)
    x = np.uint32((x ^ (x >> _FIFTEEN)) * _SECOND)
    return np.uint32(x ^ (x >> _FIFTEEN))


@compiled
def kept(low: np.uint32, high: np.uint32, row: int, column: int, cut: np.uint32, scale: np.float32) -> np.float32:
    """The dropout mask's element of a plane whose key has these words: 0 where dropped, else `scale`."""
    x = hashed(low, high, row, column >> 1)
    draw = np.uint32(x >> np.uint32((np.uint32(column) & _BIT_0) * _SIXTEEN)) & _LOW_HALF
    return scale if np.uint32(draw ^ _BIT_15) >= cut else np.float32(0)
