"""The stable code of an error response."""

from typing import Any


def code(answer: Any) -> str:
    """The code of a problem, which must have the form of one too."""
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == answer.status_code
    assert set(body) == {"type", "title", "status", "detail", "code", "errors"} | (
        {"candidates"} if body["code"].startswith("ambiguous_") else set()
    )
    return str(body["code"])
