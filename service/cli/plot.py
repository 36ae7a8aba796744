"""Curves in the terminal: braille dots in colours, or letters where there are none. Knows no job and no connection."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from service.cli import text
from service.report.curve import Curve, is_logarithmic

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white", "bright_black")
"""Colour of each curve; no more are drawn."""

_MARKS = "abcdefgh"
_HEIGHT = 15
_MAX_WIDTH = 100
_LABELS = 9
"""Columns of the labels of the vertical axis."""

_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column."""


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.high == self.low:
            return 0.5
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def at(self, place: float) -> float:
        """The value of a place."""
        if self.is_log:
            return float(self.low * (self.high / self.low) ** place)
        return self.low + place * (self.high - self.low)


def plot(curves: Sequence[Curve], console: Console) -> Text:
    """The means of the curves over their steps, as wide as the console, and a legend below.

    The vertical axis is logarithmic where the losses span more than a factor of ten.
    """
    begun = [curve for curve in curves if any(loss is not None for loss in curve.mean)]
    if not begun:
        return Text("no steps yet", text.DIM)
    shown = begun[: len(COLOURS)]
    is_coloured = console.is_terminal and not console.no_color and console.encoding.lower().startswith("utf")
    losses = [loss for curve in shown for loss in curve.mean if loss is not None]
    y = _Axis(min(losses), max(losses), is_logarithmic(min(losses), max(losses)))
    x = _Axis(min(curve.steps[0] for curve in shown), max(curve.steps[-1] for curve in shown))
    width = max(10, min(console.width, _MAX_WIDTH) - _LABELS - 1)
    lines = [Text(f"train_loss by step{' (logarithmic)' if y.is_log else ''}", text.DIM)]
    for row, cells in enumerate(_drawn(shown, x, y, width, is_coloured)):
        at_label = row in (0, _HEIGHT // 2, _HEIGHT - 1)
        label = f"{y.at(1 - row / (_HEIGHT - 1)):.4g}" if at_label else ""
        lines.append(Text.assemble((label.rjust(_LABELS - 1) + " ", text.DIM), cells))
    ends = (f"{x.low:,.0f}", f"{x.high:,.0f}")
    lines.append(Text(" " * _LABELS + ends[0] + ends[1].rjust(width - len(ends[0])), text.DIM))
    return Text("\n").join([*lines, *_legend(shown, len(begun))])


def _drawn(curves: Sequence[Curve], x: _Axis, y: _Axis, width: int, is_coloured: bool) -> list[Text]:
    """The rows of the picture."""
    columns, rows = (2, 4) if is_coloured else (1, 1)
    bits: dict[tuple[int, int], int] = {}
    owners: dict[tuple[int, int], int] = {}
    for n, curve in enumerate(curves):
        for column, row in _dots_of(curve, x, y, width * columns, _HEIGHT * rows):
            cell = row // rows, column // columns
            bits[cell] = bits.get(cell, 0) | _DOTS[row % rows][column % columns]
            owners[cell] = n
    drawn = []
    for row in range(_HEIGHT):
        line = Text()
        for cell in ((row, column) for column in range(width)):
            if cell not in owners:
                line.append(" ")
            elif is_coloured:
                line.append(chr(_BRAILLE + bits[cell]), COLOURS[owners[cell]])
            else:
                line.append(_MARKS[owners[cell]])
        line.rstrip()
        drawn.append(line)
    return drawn


def _dots_of(curve: Curve, x: _Axis, y: _Axis, width: int, height: int) -> Iterator[tuple[int, int]]:
    """Column and row of each dot of a curve, from point to point; where a bucket has no loss there is a gap."""
    points = [
        None if loss is None else (round(x.place(step) * (width - 1)), round((1 - y.place(loss)) * (height - 1)))
        for step, loss in zip(curve.steps, curve.mean, strict=True)
    ]
    yield from (point for point in points if point is not None)
    for start, end in pairwise(points):
        if start is None or end is None:
            continue
        (x0, y0), (x1, y1) = start, end
        n = max(abs(x1 - x0), abs(y1 - y0))
        for i in range(1, n + 1):
            yield round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)


def _legend(curves: Sequence[Curve], n_curves: int) -> Iterator[Text]:
    for n, curve in enumerate(curves):
        seeds = f", mean of {curve.n_jobs} jobs" if curve.n_jobs > 1 else ""
        step, loss = next(last for last in zip(curve.steps[::-1], curve.mean[::-1], strict=True) if last[1] is not None)
        label = f" {text.visible(curve.label)}{seeds}: {text.figure(loss)} at step {step:,}"
        yield Text.assemble((f"{' ' * _LABELS}{_MARKS[n]} ━━", COLOURS[n]), label)
    if n_curves > len(curves):
        yield Text(f"{' ' * _LABELS}{n_curves - len(curves):,} more are not drawn", text.DIM)
