"""How figures, values of knobs, and what differs between jobs are written."""

import re
from collections.abc import Mapping
from typing import Any


def figure(value: float | None, digits: int = 4) -> str:
    """A figure with so many significant digits, large ones in full; an en dash for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def value_label(value: Any) -> str:
    """A knob's value as in a config; of a SHA-256, which stands for a text, the beginning."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case str() if re.fullmatch("[0-9a-f]{64}", value):
            return value[:8]
    return str(value)


def label_of(values: Mapping[str, Any]) -> str:
    """What differs, in words: `lr 0.0001, n_embd 64`."""
    return ", ".join(f"{name} {value_label(value)}" for name, value in values.items())
