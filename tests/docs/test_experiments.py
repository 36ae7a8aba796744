"""The page of experiments names experiments that there are, with a command, a table and a picture of each."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from service.http.schemas.comparison import METRICS
from service.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "experiments.md").read_text("utf-8")
NAMES = [preset.name for preset in PRESETS]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return run_path(str(DOCS / "experiments.py"))


def test_every_experiment_is_there_with_its_command_table_and_picture(script: dict[str, Any]) -> None:
    assert sorted(re.findall(r"^nanomoe run (\S+)$", PAGE, re.MULTILINE)) == sorted(NAMES)
    assert sorted(script["SHOWN"]) == sorted(NAMES)
    for name in NAMES:
        assert re.search(rf"<!-- results: {name} -->\n\| .* \|\n\| --- ", PAGE), f"{name} has no table"
        assert f"](experiments/{name}.svg)" in PAGE
    assert sorted(path.stem for path in (DOCS / "experiments").glob("*.svg")) == sorted(NAMES)
    assert {metric for shown in script["SHOWN"].values() for metric in (*shown.metrics, *shown.dots)} <= set(METRICS)


def test_every_picture_is_static_and_has_a_dark_side() -> None:
    for path in (DOCS / "experiments").glob("*.svg"):
        drawn = ElementTree.parse(path)  # noqa: S314 - ours
        assert not [one for one in drawn.iter() if one.tag.removeprefix(SVG) in ("script", "image", "foreignObject")]
        assert "prefers-color-scheme:dark" in path.read_text("utf-8")


def test_a_recalled_text_ends_at_its_first_wrong_character(script: dict[str, Any]) -> None:
    n_recalled = script["n_recalled"]
    assert n_recalled("abcdef", "ab", "cdef") == 4
    assert n_recalled("abcdef", "ab", "cdXf") == 2
    assert n_recalled("abcdef", "ab", "X") == 0
    assert n_recalled("abc", "ab", "cde") == 3  # past its end there is no text to differ from
