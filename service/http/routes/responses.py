"""Answers that are written as they are: what was built here of checked parts is not checked a second time."""

from collections.abc import Mapping

from fastapi import Response
from pydantic import BaseModel


def as_json(answer: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of 200. It may hold half a million numbers."""
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")
