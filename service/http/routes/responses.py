"""JSON responses without a second validation: a model that the service built is serialised as it is."""

from collections.abc import Mapping

from fastapi import Response
from pydantic import BaseModel


def as_json(answer: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """A 200 response with `answer` as JSON. Validating it again would be slow: it may hold half a million numbers."""
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")
