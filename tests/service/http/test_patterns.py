"""No error shows a regular expression: every pattern of the contract has words."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from nanomoe.config import InitFrom, JobConfig
from service.app import create_app
from service.http import patterns, schemas
from service.http.patterns import message_of
from service.settings import Settings


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("pattern"), str):
            yield value["pattern"]
        for inner in value.values():
            yield from _patterns(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner)


def test_every_pattern_of_a_request_has_an_error_message() -> None:
    document = create_app(Settings(_env_file=None)).openapi()
    requests = [operation for path in document["paths"].values() for operation in path.values()]
    # A path's parts are judged by hand: what does not fit there is not found.
    asked = [
        [parameter for parameter in operation.get("parameters", []) if parameter["in"] != "path"]
        for operation in requests
    ]
    found = {*_patterns(asked), *_patterns(document["components"]["schemas"])}
    assert found >= {patterns.TAG, patterns.PRINTABLE, patterns.JOB_ID_PATTERN}
    assert found - patterns._MESSAGES.keys() == set()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (schemas.SubmitRequest, {"text": "a", "name": "\n"}),
        (schemas.SubmitRequest, {"text": "a", "tags": {"a": "\n"}}),
        (schemas.SubmitRequest, {"text": "a", "tags": {"ç": ""}}),
        (JobConfig, {"tokenizer": "\n"}),
        (InitFrom, {"job_id": "\n"}),
    ],
)
def test_an_error_about_a_pattern_shows_its_message(kind: type, given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(kind).validate_python(given)
    (error,) = refused.value.errors()
    assert error["type"] == "string_pattern_mismatch"
    assert message_of(error).startswith("must ")
    assert error["ctx"]["pattern"] not in message_of(error)
