"""Every point of every axis is a step of as many tokens."""

import pytest
import torch

from nanomoe.bench.training import growth


@pytest.mark.parametrize("axis", growth.AXES)
def test_a_step_has_the_same_tokens_everywhere_on_an_axis(axis: str) -> None:
    shapes = [growth._shape(f"{axis} {value}", changes) for value, changes in growth.AXES[axis].items()]
    assert {shape.n_tokens for shape in shapes} == {growth.TOKENS}
    assert all(shape.config.batch_size == shape.n_windows for shape in shapes)
    assert all(shape.config.use_moe == (axis == "experts") for shape in shapes)
    if axis == "experts":
        assert len({shape.config.expert_hidden for shape in shapes}) == 1


def test_points_come_for_each_value_and_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "TOKENS", 32)
    axes = {
        "layers": {1: {"n_layer": 1, "n_embd": 8, "block_size": 8}, 2: {"n_layer": 2, "n_embd": 8, "block_size": 8}}
    }
    monkeypatch.setattr(growth, "AXES", axes)
    points = growth.measure(torch.device("cpu"), turns=1, steps=1)
    eager = [(point.axis, point.value) for point in points if point.way == "eager"]
    assert eager == [("layers", 1), ("layers", 2)]
    assert all(point.seconds_per_token > 0 for point in points)
