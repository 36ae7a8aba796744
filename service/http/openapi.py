"""The OpenAPI document: FastAPI's own, with every error documented as a problem (RFC 9457).

Knows no route by name.
"""

import threading
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.http.authentication import COOKIE
from service.http.permissions import Permission, permissions_of
from service.http.problems import MEDIA_TYPE
from service.http.schemas import (
    Estimate,
    GenerateChunk,
    GenerateEnd,
    JobCheckpointEvent,
    JobStatusEvent,
    JobStepEvent,
    JobWarningEvent,
    OpenAIError,
    Problem,
    StatusEvent,
    SubmitRequest,
    SweepEstimate,
)
from service.http.schemas.base import SAME_AS

_REF = "#/components/schemas/"

_MEANINGS = {
    400: "The request body cannot be parsed.",
    401: "The service has keys, and the request came without a valid one.",
    403: "`Host` or `Origin` is not allowed, or the key's role does not allow the request.",
    404: "The job, sweep, checkpoint or file does not exist.",
    409: "The state of the job or checkpoint does not allow it, or several jobs may be meant; `code` names the reason.",
    412: "A precondition of the request (`If-Match`, `If-Unmodified-Since`) is not met.",
    413: "The request body or the training text is too large.",
    415: "The body is of another media type, compressed, or JSON in another charset than UTF-8.",
    416: "The range lies outside of the file.",
    422: "The request is not valid; `errors` names each fault.",
    429: "The queue is full, or a quota is used up (`quota` says what is left); `Retry-After` gives the seconds until "
    "another attempt may succeed.",
    503: "The database or the generation engine is unavailable; `Retry-After` gives the seconds until another attempt.",
    507: "The disk of the database is full.",
}


_SECURITY_SCHEMES: dict[str, Any] = {
    "key": {"type": "http", "scheme": "bearer", "description": "Key made by `nanomoe keys create`."},
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": "Session token of a browser that has signed in (`POST /session`).",
    },
}

NOT_MODIFIED: dict[str, Any] = {
    "description": "The client has the current version already (`If-None-Match`, `If-Modified-Since`)."
}
"""The documentation of a 304 answer."""


def ref(model: type[BaseModel]) -> dict[str, str]:
    """A reference to a model's schema."""
    return {"$ref": _REF + model.__name__}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: the problems that it can answer, beside those of every route."""
    return {
        status: {"description": _MEANINGS[status], "content": {MEDIA_TYPE: {"schema": ref(Problem)}}}
        for status in sorted({401, 403, *statuses})
    }


def openai_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`problems` for a route under `/v1`."""
    return {
        status: {"description": _MEANINGS[status], "content": {"application/json": {"schema": ref(OpenAIError)}}}
        for status in sorted({401, 403, *statuses})
    }


# Schemas that FastAPI does not find, because those bodies, answers and events are read or written by hand.
_BY_HAND = (
    *(Problem, OpenAIError, SubmitRequest, Estimate, StatusEvent, GenerateChunk, GenerateEnd),
    *(SweepEstimate, JobStatusEvent, JobStepEvent, JobCheckpointEvent, JobWarningEvent),
)
# FastAPI documents its own validation error wherever there is a parameter; here it is a problem, or it cannot happen.
_NOT_OURS = ("HTTPValidationError", "ValidationError")


_ONE_AT_A_TIME = threading.Lock()
"""Making the document changes schemas that the routes hold, which two requests must not do at once."""


def document(app: FastAPI) -> dict[str, Any]:
    """The document of `app`, made once, whoever asks for it at the same time."""
    with _ONE_AT_A_TIME:
        if app.openapi_schema is None:
            app.openapi_schema = _made(app)
        return app.openapi_schema


def _made(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    _, by_hand = models_json_schema([(model, "validation") for model in _BY_HAND], ref_template=_REF + "{model}")
    schemas = made["components"]["schemas"] | by_hand["$defs"]
    schemas["JsonValue"]["description"] = "Any JSON value."
    made["components"]["schemas"] = {name: schemas[name] for name in sorted(schemas) if name not in _NOT_OURS}
    _refer(made["components"]["schemas"])
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            if permissions_of(path)[method.upper()] is Permission.OPEN:
                del operation["responses"]["401"]
                operation["security"] = []
            for parameter in operation.get("parameters", []):
                _never_null(parameter["schema"])
            if _is_not_ours(operation["responses"].get("422", {})):
                del operation["responses"]["422"]
    made["components"]["securitySchemes"] = _SECURITY_SCHEMES
    # Where no key was ever made, none is needed.
    made["security"] = [{name: []} for name in _SECURITY_SCHEMES] + [{}]
    return made


def _refer(node: Any) -> None:
    """Turn every schema that says which one it is the same as into a reference to that one."""
    if isinstance(node, dict):
        if (name := node.pop(SAME_AS, None)) is not None:
            node.pop("type")
            node["$ref"] = _REF + name
        for value in node.values():
            _refer(value)
    elif isinstance(node, list):
        for value in node:
            _refer(value)


def _is_not_ours(answer: dict[str, Any]) -> bool:
    refs = [media.get("schema", {}).get("$ref", "") for media in answer.get("content", {}).values()]
    return any(ref.removeprefix(_REF) in _NOT_OURS for ref in refs)


def _never_null(schema: dict[str, Any]) -> None:
    """Remove null from a parameter's schema: a query or header can be left out, but not be null."""
    choices = [choice for choice in schema.pop("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        schema.update(choices[0])
    elif choices:
        schema["anyOf"] = choices
