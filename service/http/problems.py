"""Error responses: `application/problem+json` (RFC 9457), or, under `/v1`, OpenAI's shape; with one handler for each
kind of exception.

Input is never repeated in full: it may be huge, and it may hold characters that JSON or UTF-8 cannot. Knows no
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

from nanomoe.store.store import StoreError
from service.errors import Ambiguous, Invalid, QuotaExceeded, ServiceError, Unauthorized, store_out_of_reach
from service.http.patterns import message_of
from service.http.schemas import JobCandidate, OpenAIError, OpenAIErrorDetail, Problem, ProblemError, QuotaState

MEDIA_TYPE = "application/problem+json"
OPENAI_PREFIX = "/v1/"
"""Path prefix of the routes whose responses have OpenAI's shapes."""

_MAX_ERRORS = 20
_MAX_CHARACTERS = 300
_INPUT = "Input should be "
"""Prefix of pydantic's messages about a value's type."""

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
    """`text` shortened, and without characters that UTF-8 cannot encode."""
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
    """A problem in OpenAI's shape."""
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
    """The problem document of a `ServiceError`."""
    problem = _problem(error.status, error.code, error.detail, error.title, error.errors)
    if isinstance(error, QuotaExceeded):
        quota = QuotaState(name=error.name, limit=error.limit, used=error.used, left=error.left)
        return problem.model_copy(update={"quota": quota})
    if not isinstance(error, Ambiguous):
        return problem
    candidates = [JobCandidate.model_validate(one, from_attributes=True) for one in error.candidates]
    return problem.model_copy(update={"candidates": candidates})


def from_service_error(path: str, error: ServiceError) -> Response:
    """The response of a `ServiceError` to a request for `path`."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, ceil(error.retry_after)))}
    if isinstance(error, Unauthorized):
        # RFC 6750, 3: the error is named where a key was sent.
        sent = "" if error.code == "key_required" else ', error="invalid_token"'
        headers["WWW-Authenticate"] = f'Bearer realm="nanomoe"{sent}'
    return _write(path, of_service_error(error), headers)


def invalid(errors: Iterable[Mapping[str, Any]], body: Any) -> Invalid:
    """Pydantic's errors as one `invalid_request`; `body`: the JSON value that was validated, or None."""
    messages: dict[tuple[int | str, ...], list[str]] = {}
    for error in errors:
        found = messages.setdefault(_place(error, body), [])
        if (message := _message(error)) not in found:
            found.append(message)
    # A value of a union has errors of each member: the deepest location shows which member was meant.
    outer = {place[:length] for place in messages for length in range(len(place))}
    faults = [{"loc": list(place), "msg": _joined(texts)} for place, texts in messages.items() if place not in outer]
    place = ".".join(str(part) for part in faults[0]["loc"])
    return Invalid("invalid_request", f"{_short(place)}: {faults[0]['msg']}", errors=faults)


def _place(error: Mapping[str, Any], body: Any) -> tuple[int | str, ...]:
    """Location of an error in the request: pydantic's `loc` without its own names of union members, functions and
    keys."""
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
    """The message of an error, without names of classes and exceptions."""
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{_INPUT}an object"
    return message_of(error).removeprefix("Value error, ")


def _joined(messages: Sequence[str]) -> str:
    """One message for the errors at one location, joined where a union has an error for each member."""
    if all(message.startswith(_INPUT) for message in messages):
        return _INPUT + ", or ".join(message.removeprefix(_INPUT) for message in messages)
    return "; ".join(messages)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return from_service_error(request.url.path, error)


async def _store_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    log.error(error.code, path=request.url.path, reason=str(error))
    return from_service_error(request.url.path, store_out_of_reach(error.code))


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
        # Mounted are static files; Starlette matches every method for them.
        return any(method == "GET" or not isinstance(route, Mount) for route in found)

    served = {method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if is_served(method)}
    return sorted(served | {"OPTIONS"} | ({"HEAD"} if "GET" in served else set()))


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("unexpected_error", method=request.method, path=request.url.path, exc_info=error)
    return respond(request.url.path, 500, "internal_error", "the service failed; the cause is in its log")


def install(app: FastAPI) -> None:
    """Register the exception handlers of `app`."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(StoreError, _store_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
