"""Requests against their own JSON schemas: what is an integer there is read as one, and nothing else is."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nanomoe.config import InitFrom, JobConfig
from service.http.schemas import (
    CompletionRequest,
    GenerateRequest,
    InspectRequest,
    JobPatch,
    ScoreRequest,
    SubmitRequest,
)

JOB_ID = "0" * 32
REQUIRED: dict[type[BaseModel], dict[str, Any]] = {
    # What others must fit in.
    JobConfig: {"n_experts": 4096, "n_embd": 4096, "n_head": 1, "n_layer": 256, "k": 1, "val_fraction": 0.5},
    InitFrom: {"job_id": JOB_ID},
    SubmitRequest: {"text": "a b"},
    JobPatch: {},
    GenerateRequest: {"job_id": JOB_ID, "prompt": "a"},
    ScoreRequest: {"job_id": JOB_ID, "text": "a b"},
    InspectRequest: {"job_id": JOB_ID, "prompt": "a"},
    CompletionRequest: {"model": JOB_ID, "prompt": "a"},
}


def integers() -> Iterator[tuple[type[BaseModel], str, int]]:
    """Each field that may be an integer, and a value that it takes."""
    for model in REQUIRED:
        for name, schema in model.model_json_schema()["properties"].items():
            for choice in schema.get("anyOf", [schema]):
                if choice.get("type") == "integer":
                    yield model, name, choice["enum"][1] if "enum" in choice else choice["minimum"]


FIELDS = list(integers())


def read(model: type[BaseModel], name: str, value: str, *, as_json: bool) -> Any:
    """The field `name` of a request with the JSON `value`; as the routes read bodies, or from Python objects."""
    body = json.dumps(REQUIRED[model])[:-1] + (", " if REQUIRED[model] else "") + f'"{name}": {value}}}'
    asked = model.model_validate_json(body) if as_json else model.model_validate(json.loads(body))
    return getattr(asked, name)


def test_every_schema_has_integer_fields() -> None:
    assert len(FIELDS) > 25
    assert {model for model, _, _ in FIELDS} == set(REQUIRED) - {JobPatch}


@pytest.mark.parametrize("as_json", [True, False])
def test_a_whole_number_is_an_integer_however_it_is_written(as_json: bool) -> None:
    for model, name, value in FIELDS:
        for written in (f"{value}", f"{value}.0", f"{value}.000", f"{value}e0"):
            found = read(model, name, written, as_json=as_json)
            assert (type(found), found) == (int, value), (model, name, written)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("wrong", ["{}.5", '"{}"', '"{}.0"', "1e30", "-1e30", "true", "false", "1e999", "NaN", "[{}]"])
def test_a_value_of_another_type_is_no_integer(wrong: str, as_json: bool) -> None:
    taken = []
    for model, name, value in FIELDS:
        with contextlib.suppress(ValidationError):
            taken.append((model, name, read(model, name, wrong.format(value), as_json=as_json)))
    assert taken == []


@pytest.mark.parametrize("model", REQUIRED)
def test_bounds_are_in_the_json_schema(model: type[BaseModel]) -> None:
    assert not {"ge", "gt", "le", "lt"} & set(_keys(model.model_json_schema()))


def _keys(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema
        for value in schema.values():
            yield from _keys(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _keys(value)


def test_equal_configs_are_equal_and_stored_alike() -> None:
    one, other = JobConfig(epochs=50, seed=7), JobConfig.model_validate({"epochs": 50.0, "seed": 7.0})
    assert one == other
    assert one.model_dump_json() == other.model_dump_json()
