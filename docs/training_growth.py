"""The picture in speed.md: time per trained token over length, width, layers and experts.

`nanomoe bench train --only growth --json > growth.json`, then `.venv/bin/python docs/training_growth.py growth.json`
writes `docs/training_growth.svg`.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

COLOURS = {"eager": "#888888", "fused": "#1f77b4", "fused bfloat16": "#d62728"}
TITLES = {
    "length": "tokens of a window",
    "channels": "channels",
    "layers": "layers",
    "experts": "experts, two for each token",
}
PANEL, GAP, TOP, BOTTOM, LEFT = 190, 20, 40, 44, 52


def picture(points: list[dict[str, Any]], machine: str) -> str:
    """An SVG with a panel for each axis, both scales logarithmic, the vertical one shared."""
    machine = escape(machine)
    axes = list(dict.fromkeys(point["axis"] for point in points))
    ways = list(dict.fromkeys(point["way"] for point in points))
    micros = [1e6 * point["seconds_per_token"] for point in points]
    low, high = _decade(min(micros), math.floor), _decade(max(micros), math.ceil)
    width, height = LEFT + len(axes) * (PANEL + GAP), TOP + PANEL + BOTTOM

    def y(micro: float) -> float:
        return TOP + PANEL * (1 - math.log(micro / low) / math.log(high / low))

    font = 'font-family="sans-serif" font-size="11"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>',
        f"<title>Microseconds per trained token, {machine}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="14">µs per trained token, {machine}</text>',
    ]
    for n, way in enumerate(ways):
        x = LEFT + 120 * n
        parts.append(f'<rect x="{x}" y="21" width="10" height="10" fill="{_colour(way)}"/>')
        parts.append(f'<text x="{x + 14}" y="30">{way}</text>')
    for n, axis in enumerate(axes):
        left = LEFT + n * (PANEL + GAP)
        values = sorted({point["value"] for point in points if point["axis"] == axis})
        parts += _frame(left, TITLES[axis], values)
        for tick in _ticks(low, high):
            parts.append(
                f'<line x1="{left}" x2="{left + PANEL}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#dddddd"/>'
            )
            if n == 0:
                parts.append(f'<text x="{left - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for way in ways:
            line = sorted((p["value"], p["seconds_per_token"]) for p in points if (p["axis"], p["way"]) == (axis, way))
            places = [(_x(left, values, value), y(1e6 * seconds)) for value, seconds in line]
            drawn = " ".join(f"{x:.1f},{at:.1f}" for x, at in places)
            parts.append(f'<polyline points="{drawn}" fill="none" stroke="{_colour(way)}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{at:.1f}" r="3" fill="{_colour(way)}"/>' for x, at in places]
    return "\n".join([*parts, "</svg>\n"])


def _frame(left: float, title: str, values: list[int]) -> list[str]:
    frame = f'<rect x="{left}" y="{TOP}" width="{PANEL}" height="{PANEL}" fill="none" stroke="#444444"/>'
    middle = left + PANEL / 2
    parts = [frame, f'<text x="{middle}" y="{TOP + PANEL + 34}" text-anchor="middle">{title}</text>']
    for value in values:
        x = _x(left, values, value)
        parts.append(f'<text x="{x:.1f}" y="{TOP + PANEL + 15}" text-anchor="middle">{value}</text>')
    return parts


def _x(left: float, values: list[int], value: int) -> float:
    inner = PANEL - 40
    return left + 20 + inner * math.log(value / values[0]) / max(math.log(values[-1] / values[0]), 1e-9)


def _decade(value: float, rounded: Any) -> float:
    """The power of ten at or beyond the value."""
    power: float = 10.0 ** rounded(math.log10(value))
    return power


def _ticks(low: float, high: float) -> list[float]:
    decades = round(math.log10(high / low))
    return [low * 10**n for n in range(decades + 1)]


def _colour(way: str) -> str:
    return COLOURS.get(way, "#2ca02c")


def main() -> None:
    """Draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, help="JSON of nanomoe bench train --only growth --json")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    given = json.loads(options.figures.read_text(encoding="utf-8"))
    options.to.write_text(picture(given["growth"], given["machine"]), encoding="utf-8")


if __name__ == "__main__":
    main()
