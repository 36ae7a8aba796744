"""The picture in speed.md is drawn to scale, and the one that is there shows every axis."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from nanomoe.bench.training.growth import AXES

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def script() -> dict[str, Any]:
    return run_path(str(DOCS / "training_growth.py"))


def test_heights_and_places_are_logarithmic(script: dict[str, Any]) -> None:
    micros = {1: 10.0, 2: 100.0, 4: 1000.0}
    points = [
        {"axis": "layers", "value": value, "way": way, "seconds_per_token": factor * micro / 1e6}
        for way, factor in (("eager", 1.0), ("fused", 0.1))
        for value, micro in micros.items()
    ]
    drawn = ElementTree.fromstring(script["picture"](points, "a <machine>"))  # noqa: S314 - just drawn
    eager, fused = (
        [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
        for line in drawn.iter(f"{SVG}polyline")
    )
    places, heights = zip(*eager, strict=True)
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert fused[1][1] == pytest.approx(heights[0], abs=0.2), "a tenth of 100 is 10"
    assert heights[2] == pytest.approx(script["TOP"]), "the largest is at the top"


def test_the_picture_shows_each_axis_in_each_value(script: dict[str, Any]) -> None:
    drawn = ElementTree.parse(DOCS / "training_growth.svg")  # noqa: S314 - our own
    words = [text.text for text in drawn.iter(f"{SVG}text")]
    for axis, values in AXES.items():
        assert script["TITLES"][axis] in words
        assert {str(value) for value in values} <= set(words)
    assert len(list(drawn.iter(f"{SVG}polyline"))) >= len(AXES)
