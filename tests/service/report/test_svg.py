"""Charts: to scale, with gaps, and as much of them as can be read."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from service.report import svg
from service.report.curve import Curve

SVG = "{http://www.w3.org/2000/svg}"


def curve(label: str, *mean: float | None) -> Curve:
    return Curve(label, 1, range(1, len(mean) + 1), mean, mean, mean)


def inline(*given: Curve) -> str:
    return svg.curves(given, title="", x_name="").inline()


@pytest.mark.parametrize(
    ("low", "high", "found"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.13, 0.41, [0.2, 0.3, 0.4]), (2, 2, [2])]
)
def test_ticks_are_round(low: float, high: float, found: list[float]) -> None:
    assert svg.ticks(low, high) == found


def test_ticks_of_a_logarithmic_axis_are_round_too() -> None:
    assert svg.log_ticks(0.3, 4) == [0.5, 1, 2]
    assert svg.log_ticks(0.01, 1000) == [0.01, 0.1, 1, 10, 100, 1000]


def test_lines_are_drawn_to_scale_linear_or_logarithmic() -> None:
    def heights(values: list[float], **how: Any) -> list[float]:
        picture = svg.curves([curve("<a>", *values)], title="a & b", x_name="step", **how)
        drawn = ElementTree.fromstring(picture.file())  # noqa: S314 - just drawn
        (mean,) = drawn.iter(f"{SVG}polyline")
        return [float(place.split(",")[1]) for place in mean.attrib["points"].split()]

    low, middle, high = heights([1.0, 2.0, 3.0])
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    low, middle, high = heights([1.0, 10.0, 100.0])
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    low, middle, high = heights([1.0, 10.0, 100.0], is_linear=True)
    assert low - middle == pytest.approx((middle - high) / 10, abs=0.2)


def test_a_curve_is_interrupted_where_there_is_no_figure() -> None:
    picture = inline(curve("a", 1, 2, None, 4))
    assert [points.count(",") for points in re.findall(r'<polyline points="([^"]*)"', picture)] == [2, 1]
    assert [points.count(",") for points in re.findall(r'<polygon points="([^"]*)"', picture)] == [4, 2]


def test_bands_are_drawn_for_few_curves_only() -> None:
    assert inline(curve("a", 1, 2)).count("<polygon") == 1
    assert "<polygon" not in inline(*[curve("a", 1, 2)] * (svg.MANY + 1))


def test_no_step_yet_is_a_picture_too() -> None:
    assert "<polyline" not in inline(Curve("a", 0, (), ()))


def test_every_job_is_a_dot() -> None:
    panels = [svg.Dots("x", [[1.0, 2.0], [3.0]]), svg.Dots("y", [[5.0, 5.0], []])]
    drawn = ElementTree.fromstring(svg.dots(panels, ["a", "b"], title="t").file())  # noqa: S314 - just drawn
    assert len([*drawn.iter(f"{SVG}circle")]) == 5
    assert [text.text for text in drawn.iter(f"{SVG}text")][-2:] == ["a", "b"]


def test_a_file_names_its_curves_and_counts_those_it_does_not_name() -> None:
    unbegun = Curve("unbegun", 0, (), ())
    given = [unbegun, *(curve(f"lr {n}", 1, 2) for n in range(svg.MOST_NAMES + 3))]
    picture = svg.curves(given, title="a & b", x_name="step")
    drawn = ElementTree.fromstring(picture.file())  # noqa: S314 - just drawn
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert (texts[0], texts[-2:]) == ("a & b", [f"lr {svg.MOST_NAMES - 1}", "+ 3"])
    assert "unbegun" not in texts
    first = next(drawn.iter(f"{SVG}rect"))
    assert first.attrib["fill"] == svg.colour_of(1) == next(drawn.iter(f"{SVG}polyline")).attrib["stroke"]
    assert "<style>" not in picture.inline()  # it would hold for all of the page
