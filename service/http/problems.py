"""Every error as `application/problem+json` (RFC 9457), or, under `/v1`, in OpenAI's shape: one handler for each kind
of exception, one place that writes them all.

What a request sent is never repeated in full: it may be huge, and it may hold what JSON or UTF-8 cannot. Knows no
route.
"""

from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from itertools import islice
from math import ceil
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from service.errors import Invalid, ServiceError
from service.http.patterns import message_of
from service.http.schemas import OpenAIError, OpenAIErrorDetail, Problem, ProblemError

MEDIA_TYPE = "application/problem+json"
OPENAI_PREFIX = "/v1/"
"""Under it everything has OpenAI's shapes."""

_MAX_ERRORS = 20
_MAX_CHARACTERS = 300
_INPUT = "Input should be "
"""How pydantic begins to say what a value should be."""

# HTTP errors that the framework raises by itself.
_CODES = {
    400: "invalid_body",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}

log = structlog.get_logger(__name__)


def _short(text: str) -> str:
    """`text` as something that can be shown: cut, and without what UTF-8 cannot hold."""
    cut = text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "..."
    return cut.encode("utf-8", "replace").decode()


def _problem(
    status: int, code: str, detail: str, title: str | None = None, errors: Iterable[Mapping[str, Any]] = ()
) -> Problem:
    return Problem(
        type="about:blank",
        title=title or HTTPStatus(status).phrase,
        status=status,
        detail=_short(detail),
        code=code,
        errors=[
            ProblemError(
                loc=[part if isinstance(part, int) else _short(str(part)) for part in error["loc"]],
                msg=_short(error["msg"]),
            )
            for error in islice(errors, _MAX_ERRORS)
        ],
    )


def _write(path: str, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request for `path`."""
    if path.startswith(OPENAI_PREFIX):
        return Response(openai_error(problem).model_dump_json(), problem.status, headers, "application/json")
    return Response(problem.model_dump_json(), problem.status, headers, MEDIA_TYPE)


def openai_error(problem: Problem) -> OpenAIError:
    """A problem as OpenAI's clients read it."""
    kinds = {429: "rate_limit_error"}
    kind = kinds.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error")
    # The first part says `body` or `path`, which a parameter's name does not.
    param = ".".join(map(str, problem.errors[0].loc[1:])) if problem.errors else ""
    return OpenAIError(
        error=OpenAIErrorDetail(message=problem.detail, type=kind, param=param or None, code=problem.code)
    )


def respond(path: str, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as the HTTP answer to a request for `path`."""
    return _write(path, _problem(status, code, detail), headers)


def of_service_error(error: ServiceError) -> Problem:
    """What a `ServiceError` says to a client."""
    return _problem(error.status, error.code, error.detail, error.title, error.errors)


def from_service_error(path: str, error: ServiceError) -> Response:
    """What a `ServiceError` answers to a request for `path`."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, ceil(error.retry_after)))}
    return _write(path, of_service_error(error), headers)


def invalid(errors: Iterable[Mapping[str, Any]], body: Any) -> Invalid:
    """Pydantic's errors as one `invalid_request`; `body`: the JSON value that was validated, or None."""
    messages: dict[tuple[int | str, ...], list[str]] = {}
    for error in errors:
        found = messages.setdefault(_place(error, body), [])
        if (message := _message(error)) not in found:
            found.append(message)
    # A value that may have several types has an error of each: that type was meant which was followed furthest.
    outer = {place[:length] for place in messages for length in range(len(place))}
    faults = [{"loc": list(place), "msg": _joined(said)} for place, said in messages.items() if place not in outer]
    place = ".".join(str(part) for part in faults[0]["loc"])
    return Invalid("invalid_request", f"{_short(place)}: {faults[0]['msg']}", errors=faults)


def _place(error: Mapping[str, Any], body: Any) -> tuple[int | str, ...]:
    """Where an error lies: of pydantic's `loc` what was sent or is missing, and not the names that pydantic itself has
    for the members of a union, for functions and for keys."""
    source, *parts = error["loc"]
    if source != "body":
        return (source, *parts[:1])
    place = [source]
    value = body
    for part in parts:
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            place.append(part)
            value = value[part]
    if error["type"] == "missing":
        place += parts[-1:]
    return tuple(place)


def _message(error: Mapping[str, Any]) -> str:
    """What is wrong, without the names of classes and exceptions."""
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{_INPUT}an object"
    return message_of(error).removeprefix("Value error, ")


def _joined(messages: Sequence[str]) -> str:
    """What is wrong in one place, where a value may have several types with each of them."""
    if all(message.startswith(_INPUT) for message in messages):
        return _INPUT + ", or ".join(message.removeprefix(_INPUT) for message in messages)
    return "; ".join(messages)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return from_service_error(request.url.path, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if any(one["type"] == "json_invalid" for one in error.errors()):
        return respond(request.url.path, 400, "invalid_body", "the body is not JSON")
    return from_service_error(request.url.path, invalid(error.errors(), error.body))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http_error")
    headers, detail = dict(error.headers or {}), error.detail
    if error.status_code == 404:
        detail = f"there is no {request.url.path}"
    elif error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    return respond(request.url.path, error.status_code, code, detail, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """The methods of all routes with the path of `request`; Starlette names those of one of them."""

    # Where something is mounted, the path was taken apart to find it.
    root_path = request.scope.get("app_root_path", request.scope["root_path"])

    def is_served(method: str) -> bool:
        scope = {**request.scope, "method": method, "root_path": root_path}
        found = [route for route in request.app.routes if route.matches(scope)[0] is Match.FULL]
        # What is mounted are files; Starlette takes every method for theirs.
        return any(method == "GET" or not isinstance(route, Mount) for route in found)

    served = {method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if is_served(method)}
    return sorted(served | {"OPTIONS"} | ({"HEAD"} if "GET" in served else set()))


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("unexpected_error", method=request.method, path=request.url.path, exc_info=error)
    return respond(request.url.path, 500, "internal_error", "the service failed; its log says how")


def install(app: FastAPI) -> None:
    """Answer every exception of `app` with a problem."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
