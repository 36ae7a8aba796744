import json
import math

import pytest

from nanomoe.indented_json import indented


@pytest.mark.parametrize(
    "value",
    [
        {}, [], 1, "a", None, [[]], {"a": {}}, {"a": []}, [1, 2.5e-9, 1e22, True, None], {"ç\n\"": "\u2028", "b": -0.0},
        {"a": [{"b": 1, "c": [1, [2, (3, {"d": []})]]}, {}, "x"], "e": {"f": {"g": [None]}}}, [{"a": 1}, {"b": [2]}],
        [{"%s": ",\n", "b": [[1, 2], []]}, {"%s": "%d", "b": [[3]]}], [{"a": {}}, {"a": {"b": 1}}, {"a": {"b": 2}}],
        [{}, {}], [[], [{}]], [1, [2], "c", {"d": (3,)}, None], [{"a": 1, "b": 2}, {"b": 1, "a": 2}], [[[1]], [[2, 3]]],
    ],
)  # fmt: skip
def test_the_text_is_that_of_the_standard_library(value: object) -> None:
    assert indented(value) == json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)


def test_a_number_that_is_not_finite_is_refused_however_deep() -> None:
    for value in (math.nan, [math.inf], {"a": [{"b": -math.inf}, []]}):
        with pytest.raises(ValueError, match="JSON"):
            indented(value)
