"""Where a bad request is said to be wrong: at a place of what was sent, in words that are not the validator's."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from service.http.problems import invalid
from tests.api import TEXT, Api
from tests.service.http.test_openapi import valid_requests

BAD: list[Any] = [
    None, True, -1, 10**12, 1.5, "", "x", "x" * 300, "\x00", {}, {"a": 1}, {"": [1]}, {"a b": "x" * 300},
    [], [""], [[]], [None], [True], [1.5], [-1], ["a", 1], [1, "a"], [[1], "a"], ["a", [1]], [[1], ["a"]], [{}],
    ["x"] * 17, ["x" * 300], [0.9, "a"], [0.9, 0.9, 0.9],
]  # fmt: skip
IN_PLACES = re.compile(r"[\[\]()]|constrained|literal|function|union|tagged")
IN_MESSAGES = re.compile(r"constrained|literal|\w\(\)|union|tagged|instance of|discriminator|dictionary or|Value error")
"""How pydantic calls the types that a value may have, its own functions and our classes."""


def _schemas(document: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    """The properties of a route's JSON body."""
    operation = document["paths"][path][method]
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    properties: dict[str, Any] = document["components"]["schemas"][name]["properties"] if name else {}
    return properties


def _bodies(api: Api) -> Iterator[tuple[str, str, Any]]:
    """Every field of every body, and of a job's config, with every bad value; and bodies that are no object."""
    job_id = api.submit()["id"]
    document = api.http.get("/openapi.json").json()
    for method, path, body in valid_requests(job_id, job_id, api.submit_sweep()["id"]):
        if body is None:
            continue
        template = path.replace(job_id, "{job_id}")
        yield from ((method, path, bad) for bad in BAD)
        for field in (*_schemas(document, template, method.lower()), "unknown"):
            yield from ((method, path, body | {field: bad}) for bad in BAD)
        if path == "/jobs":
            for knob in document["components"]["schemas"]["JobConfig"]["properties"]:
                yield from ((method, path, {"text": TEXT, "config": {knob: bad}}) for bad in BAD)


def _leads_into(loc: list[str | int], sent: Any) -> bool:
    """Whether a place is one of what was sent, but for a last part, which may be what is missing."""
    for n, part in enumerate(loc):
        try:
            sent = sent[part]
        except (KeyError, TypeError, IndexError):
            return isinstance(sent, dict | list) and n == len(loc) - 1
    return True


def _told(path: str, answer: httpx.Response) -> tuple[list[list[str | int]], list[str]]:
    """The places and the messages of an error, as a problem or as OpenAI writes it."""
    if path.startswith("/v1"):
        error = answer.json()["error"]
        param = (error["param"] or "").split(".")
        return [["body", *(int(part) if part.isdecimal() else part for part in param if part)]], [error["message"]]
    problem = answer.json()
    assert problem["errors"] or problem["code"] != "invalid_request"
    faults = problem["errors"]
    return [fault["loc"] for fault in faults], [problem["detail"], *(fault["msg"] for fault in faults)]


def test_no_error_shows_pydantics_terms(api: Api) -> None:
    n_refused = 0
    for method, path, body in _bodies(api):
        answer = api.http.request(method, path, json=body, params={"dry_run": True} if path == "/jobs" else None)
        assert answer.status_code < 500, (path, body, answer.text)
        if answer.status_code != 422:
            continue
        n_refused += 1
        places, messages = _told(path, answer)
        for place in places:
            assert place[0] == "body", (path, body, place)
            assert _leads_into(place[1:], body), (path, body, place)
            assert not any(IN_PLACES.search(str(part)) for part in place), (path, body, place)
        assert not any(IN_MESSAGES.search(message) for message in messages), (path, body, messages)
    assert n_refused > 1000


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/jobs?limit=many", ["query", "limit"]),
        ("/jobs?status=gone", ["query", "status"]),
        ("/jobs?nope=1", ["query", "nope"]),
    ],
)
def test_a_bad_parameter_is_named(api: Api, path: str, place: list[str]) -> None:
    answer = api.http.get(path)
    assert answer.status_code == 422
    assert [fault["loc"][:2] for fault in answer.json()["errors"]] == [place]
    assert not any(IN_PLACES.search(str(part)) for fault in answer.json()["errors"] for part in fault["loc"])


class Either(BaseModel):
    model_config = ConfigDict(strict=True)

    value: int | list[int] | dict[str, int]


@pytest.mark.parametrize(
    ("value", "place", "message"),
    [
        ("a", ["value"], "Input should be a valid integer, or a valid list, or a valid dictionary"),
        ([1, "a"], ["value", 1], "Input should be a valid integer"),
        ({"k": "a"}, ["value", "k"], "Input should be a valid integer"),
    ],
)
def test_an_error_in_a_union_names_the_member_that_was_meant(value: Any, place: list[str | int], message: str) -> None:
    body = {"value": value}
    with pytest.raises(ValidationError) as raised:
        Either.model_validate(body)
    faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in raised.value.errors()]
    error = invalid(faults, body)
    assert error.errors == [{"loc": ["body", *place], "msg": message}]
    assert error.detail == f"{'.'.join(map(str, ['body', *place]))}: {message}"
