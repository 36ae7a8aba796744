"""Charts as static SVG: lines with bands, a figure over a parameter, and dots with their spread. Knows no job.

Legible on a light and on a dark ground: within a page the axes take the colour of the text around them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from service.report.curve import Curve, Values, is_logarithmic
from service.report.labels import figure

COLOURS = ("#0072b2", "#d55e00", "#00876a", "#b3558c", "#a87400", "#3793c9", "#6f5fc2", "#7a7a7a")
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart, darkened for lines on white."""

MANY = 24
"""More curves than these are drawn thinner, and without bands."""

MOST_NAMES = 12
"""Most lines that a legend names."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 40
_TITLE = 24
"""Height at the top that the title takes: a page, which says the title itself, sees what is below."""

_LEGEND_ROW = 18
_STYLE = "svg{color:#57606a}.t{fill:#24292f}@media(prefers-color-scheme:dark){svg{color:#9198a1}.t{fill:#e6edf3}}"


def colour_of(index: int) -> str:
    """The colour of a line by its number."""
    return COLOURS[index % len(COLOURS)]


@dataclass(frozen=True)
class Picture:
    """A chart. `inline()` goes into a page that says its title and names its lines; `file()` stands alone."""

    title: str
    names: Sequence[str]
    """Names of the lines, by their number; of one without a name nothing is said."""

    parts: Sequence[str]
    width: int
    height: int

    def inline(self) -> str:
        """An element of an HTML page, as wide as there is room, without title and legend."""
        size = f'style="max-width:{self.width}px;width:100%;height:auto"'
        return self._svg((0, _TITLE, self.width, self.height - _TITLE), size, "".join(self.parts))

    def file(self) -> str:
        """The text of an SVG file, with its title above and a legend below."""
        legend, n_rows = _legend(self.names, self.width, self.height)
        height = self.height + n_rows * _LEGEND_ROW + 6
        title = f'<text class="t" x="8" y="20" font-weight="600">{escape(self.title)}</text>'
        drawn = "\n".join([f"<style>{_STYLE}</style>", title, *self.parts, *legend])
        return self._svg((0, 0, self.width, height), f'width="{self.width}" height="{height}"', f"\n{drawn}\n") + "\n"

    def _svg(self, box: tuple[int, int, int, int], size: str, drawn: str) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(map(str, box))}" {size} role="img" '
            f'aria-label="{escape(self.title)}" font-family="system-ui,sans-serif" font-size="12" fill="currentColor">'
            f"{drawn}</svg>"
        )


@dataclass(frozen=True)
class Series:
    """A figure over the values of a parameter: for each value the figures of its jobs."""

    label: str
    points: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Dots:
    """A figure of several groups of jobs: each job's value."""

    title: str
    values: Sequence[Sequence[float]]
    """By group, one for each job that has it."""


@dataclass(frozen=True)
class _Axis:
    """Where values lie between two places, in pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = field(default=False, kw_only=True)

    def at(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        if self.is_log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        return (log_ticks if self.is_log else ticks)(self.low, self.high)


def ticks(low: float, high: float) -> list[float]:
    """At most seven round values between two others."""
    if not high > low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(part * power for part in (1, 2, 5, 10) if part * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 and so on between two positive values; of more than seven the powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [(part, part * 10.0**decade) for decade in decades for part in (1, 2, 5)]
    inside = [(part, value) for part, value in every if low <= value <= high]
    return [value for part, value in inside if part == 1 or len(inside) <= 7]


def curves(
    given: Sequence[Curve],
    *,
    title: str,
    x_name: str,
    width: int = 720,
    height: int = 330,
    is_linear: bool = False,
) -> Picture:
    """Curves over steps, each in its colour, with its band where there are few of them.

    The vertical axis is logarithmic where the values span more than a factor of ten, unless `is_linear`. `width` and
    `height`, with the title and without the legend, are in pixels.
    """
    has_bands = len(given) <= MANY
    known = [value for curve in given for value in _edges(curve, has_bands) if value is not None]
    y = _values_axis(known, height, _TOP, is_linear=is_linear)
    steps = [step for curve in given for step in (*curve.steps[:1], *curve.steps[-1:])]
    x = _Axis(min(steps, default=0), max(steps, default=1), _LEFT, width - _RIGHT)
    parts = [*_grid(y, _LEFT, width - _RIGHT), *_below(((x.at(step), figure(step)) for step in x.ticks()), height)]
    parts.append(_x_name(x_name, width, height))
    for index, curve in enumerate(given):
        parts += _curve(curve, x, y, colour_of(index), has_bands)
    return Picture(title, [curve.label if curve.steps else "" for curve in given], parts, width, height)


def by_parameter(
    values: Sequence[str],
    series: Sequence[Series],
    *,
    title: str,
    x_name: str,
    width: int = 480,
    height: int = 304,
) -> Picture:
    """A point for each job and the mean of those with the same value; a line for each series. The values stand at equal
    distances."""
    known = [value for one in series for figures in one.points for value in figures]
    y = _values_axis(known, height, _TOP)
    x = _Axis(-0.5, len(values) - 0.5, _LEFT, width - _RIGHT)
    every = max(1, math.ceil(max(map(len, values)) * 7 * len(values) / (width - _LEFT - _RIGHT)))
    named = ((x.at(index), name) for index, name in enumerate(values) if index % every == 0)
    parts = [*_grid(y, _LEFT, width - _RIGHT), *_below(named, height), _x_name(x_name, width, height)]
    for index, one in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * 5
        parts += _series(values, one, [x.at(place) + shift for place in range(len(values))], y, colour_of(index))
    return Picture(title, [one.label for one in series], parts, width, height)


def dots(panels: Sequence[Dots], labels: Sequence[str], *, title: str, width: int = 720, height: int = 330) -> Picture:
    """Charts side by side, each with a scale of its own: every job a dot, the mean of its group a line."""
    parts: list[str] = []
    room = (width - 8) / len(panels)
    for n, panel in enumerate(panels):
        y = _values_axis([value for group in panel.values for value in group], height, _TOP + 26)
        left = 8 + n * room + 54
        step = (room - 64) / len(labels)
        parts.append(f'<text x="{left:.0f}" y="{_TOP + 8}">{escape(panel.title)}</text>')
        parts += _grid(y, left, 8 + (n + 1) * room - 10)
        for index, group in enumerate(panel.values):
            parts += _group(group, left + (index + 0.5) * step, y, colour_of(index))
    return Picture(title, labels, parts, width, height)


def _values_axis(known: Sequence[float], height: int, top: int, *, is_linear: bool = False) -> _Axis:
    low, high = min(known, default=0.0), max(known, default=1.0)
    return _Axis(low, high, height - _BOTTOM, top, is_log=not is_linear and is_logarithmic(low, high))


def _grid(y: _Axis, left: float, right: float) -> Iterator[str]:
    for value in y.ticks():
        at = y.at(value)
        yield (
            f'<line x1="{left:.0f}" x2="{right:.0f}" y1="{at:.1f}" y2="{at:.1f}" stroke="currentColor" opacity=".2"/>'
        )
        yield f'<text x="{left - 8:.0f}" y="{at + 4:.1f}" text-anchor="end">{figure(value)}</text>'


def _below(named: Iterable[tuple[float, str]], height: int) -> Iterator[str]:
    for x, name in named:
        yield f'<text x="{x:.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>'


def _x_name(name: str, width: int, height: int) -> str:
    return f'<text x="{width - _RIGHT}" y="{height - 6}" text-anchor="end">{escape(name)}</text>'


def _edges(curve: Curve, has_band: bool) -> Iterator[float | None]:
    yield from curve.mean
    if has_band:
        yield from (*curve.low, *curve.high)


def _curve(curve: Curve, x: _Axis, y: _Axis, colour: str, has_band: bool) -> Iterator[str]:
    """The band, and the line over it, with gaps where there is no value."""
    if has_band and curve.low:
        for here in _runs(curve.high):
            upper = [_place(x, y, curve.steps[i], curve.high[i]) for i in here]
            lower = [_place(x, y, curve.steps[i], curve.low[i]) for i in reversed(here)]
            yield f'<polygon points="{" ".join([*upper, *lower])}" fill="{colour}" opacity=".2"/>'
    style = 'stroke-width="2"' if has_band else 'stroke-width="0.8" opacity=".5"'
    for here in _runs(curve.mean):
        points = " ".join(_place(x, y, curve.steps[i], curve.mean[i]) for i in here)
        line = f'<polyline points="{points}" fill="none" stroke="{colour}" {style}>'
        yield f"{line}<title>{escape(curve.label)}</title></polyline>"


def _runs(values: Values) -> Iterator[list[int]]:
    """Places of values that follow each other without a gap."""
    for is_known, here in groupby(range(len(values)), lambda place: values[place] is not None):
        if is_known:
            yield list(here)


def _place(x: _Axis, y: _Axis, step: float, value: float | None) -> str:
    assert value is not None, "a gap has no place"
    return f"{x.at(step):.1f},{y.at(value):.1f}"


def _series(values: Sequence[str], series: Series, centres: Sequence[float], y: _Axis, colour: str) -> Iterator[str]:
    means = [(place, _mean(figures)) for place, figures in enumerate(series.points) if figures]
    points = " ".join(f"{centres[place]:.1f},{y.at(mean):.1f}" for place, mean in means)
    yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for place, figures in enumerate(series.points):
        yield from (_dot(centres[place], y.at(value), 2.5, colour) for value in figures)
    for place, mean in means:
        name = ", ".join(filter(None, (series.label, values[place])))
        at = f'cx="{centres[place]:.1f}" cy="{y.at(mean):.1f}"'
        yield f'<circle {at} r="4.5" fill="{colour}"><title>{escape(name)}: {figure(mean)}</title></circle>'


def _group(values: Sequence[float], centre: float, y: _Axis, colour: str) -> Iterator[str]:
    middle = (len(values) - 1) / 2
    yield from (_dot(centre + 5 * (i - middle), y.at(value), 4, colour) for i, value in enumerate(values))
    if values:
        mean = y.at(_mean(values))
        ends = f'x1="{centre - 14:.1f}" x2="{centre + 14:.1f}" y1="{mean:.1f}" y2="{mean:.1f}"'
        yield f'<line {ends} stroke="{colour}" stroke-width="2"/>'


def _dot(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}" opacity=".75"/>'


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _legend(names: Sequence[str], width: int, top: int) -> tuple[list[str], int]:
    """The names beside their colours, in rows below `top`, and how many rows they take."""
    named = [(index, name) for index, name in enumerate(names) if name]
    parts, x, row = [], float(_LEFT), 0
    for index, name in named[:MOST_NAMES]:
        room = 30 + 7.0 * len(name)
        if x + room > width and x > _LEFT:
            x, row = float(_LEFT), row + 1
        at = top + row * _LEGEND_ROW + 8
        parts.append(f'<rect x="{x:.0f}" y="{at}" width="14" height="4" fill="{colour_of(index)}"/>')
        parts.append(f'<text x="{x + 20:.0f}" y="{at + 6}">{escape(name)}</text>')
        x += room
    if len(named) > MOST_NAMES:
        row += 1
        more = f"+ {len(named) - MOST_NAMES:,}"
        parts.append(f'<text x="{_LEFT}" y="{top + row * _LEGEND_ROW + 14}">{more}</text>')
    return parts, row + 1
