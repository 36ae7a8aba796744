"""JSON with an entry a line, as `json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)` writes it, in a
fraction of the time: the standard library indents in Python, and its encoder in C only writes what has one level.

So numbers and strings are given to the encoder many at a time, one a line, which none of them contains; a list of
objects with the same keys key by key.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

_NESTED = frozenset({dict, list, tuple})
_LINES = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=("\n", ": "))


def indented(value: object, depth: int = 0) -> str:
    """The JSON of a value so many levels down, whose objects have strings as keys.

    Raises:
        ValueError: a number is not finite.
    """
    return _each([value], depth)[0]


def _each(values: Sequence[Any], depth: int) -> list[str]:
    """The JSON of each of some values, all of them `depth` levels down."""
    kinds = set(map(type, values))
    if kinds.isdisjoint(_NESTED):
        return _LINES.encode(values)[1:-1].split("\n") if values else []
    if kinds <= {list, tuple}:
        parts = iter(_each(list(chain.from_iterable(values)), depth + 1))
        return [_joined("[", islice(parts, len(value)), "]", depth) for value in values]
    if kinds == {dict} and len(values) > 1 and len(set(map(tuple, values))) == 1 and values[0]:
        columns = [_each(column, depth + 1) for column in zip(*(value.values() for value in values), strict=True)]
        entries = (f"{key.replace('%', '%%')}: %s" for key in _each(list(values[0]), 0))
        return list(map(_joined("{", entries, "}", depth).__mod__, zip(*columns, strict=True)))
    nested = [type(value) in _NESTED for value in values]
    plain = iter(_each([value for value, is_nested in zip(values, nested, strict=True) if not is_nested], depth))
    return [_one(value, depth) if is_nested else next(plain) for value, is_nested in zip(values, nested, strict=True)]


def _one(value: Any, depth: int) -> str:
    """The JSON of a list or an object."""
    if not isinstance(value, dict):
        return _joined("[", _each(value, depth + 1), "]", depth)
    entries = zip(_each(list(value), 0), _each(list(value.values()), depth + 1), strict=True)
    return _joined("{", map(": ".join, entries), "}", depth)


def _joined(opening: str, entries: Iterable[str], closing: str, depth: int) -> str:
    inner = "\n" + " " * (depth + 1)
    text = ("," + inner).join(entries)
    return f"{opening}{inner}{text}{inner[:-1]}{closing}" if text else opening + closing
