"""The body of `POST /jobs`: JSON, or a form in which a file needs no JSON quoting. One dependency reads both, and one
document describes both.
"""

import codecs
import sys
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.datastructures import FormData
from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.datastructures import MutableHeaders, UploadFile

from nanomoe.config import JobConfig
from service.errors import Invalid, TooLarge
from service.http.openapi import ref
from service.http.problems import invalid
from service.http.routes.parameters import Service
from service.http.schemas import SubmitRequest

# Parts of the form that hold JSON; the others hold their value as it is.
_JSON_PARTS = frozenset({"config", "tags", "priority"})

_FIELDS = SubmitRequest.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]

DOCUMENTED: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": ref(SubmitRequest),
                "examples": {
                    "reference": {"summary": "The reference run", "value": {"text": "Era uma vez um gato."}},
                    "changed": {
                        "summary": "Some knobs changed",
                        "value": {"text": "Era uma vez um gato.", "config": {"epochs": 100, "lr": 0.005}},
                    },
                },
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": _FIELDS | {"config": ref(JobConfig)},
                    "required": ["text"],
                    "additionalProperties": False,
                },
                "encoding": {part: {"contentType": "application/json"} for part in sorted(_JSON_PARTS)},
            },
        },
    }
}


async def _read(request: Request, service: Service) -> SubmitRequest:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _validate(await request.body())
    if kind == "multipart/form-data":
        limit = service.settings.max_text_bytes
        # A part may be as large as the body may be, which is bounded: too large a text is refused as in a JSON body.
        async with _with_bytes_for_characters(request).form(
            max_files=len(_FIELDS), max_fields=len(_FIELDS), max_part_size=sys.maxsize
        ) as form:
            return _validate(to_json(await _values(form, limit), inf_nan_mode="constants"))
    raise HTTPException(415, "send the job as application/json or multipart/form-data (curl: -H, or -F)")


def _with_bytes_for_characters(request: Request) -> Request:
    """The request with its form declared as Latin-1, in which each byte is a character.

    Starlette decodes what is not UTF-8 as Latin-1, and its guess could not be detected afterwards.
    """
    headers = MutableHeaders(raw=list(request.scope["headers"]))
    headers["content-type"] += "; charset=latin-1"
    return Request({**request.scope, "headers": headers.raw}, request.receive)


Submission = Annotated[SubmitRequest, Depends(_read)]


def _validate(body: bytes) -> SubmitRequest:
    try:
        return SubmitRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        if found[0]["type"] == "json_invalid":
            if "hex escape" in found[0]["msg"]:
                raise Invalid(
                    "invalid_text", "a string holds half of a surrogate pair, which is no character"
                ) from error
            raise HTTPException(400, f"the body cannot be read: {found[0]['msg']}") from error
        raise invalid([{**fault, "loc": ("body", *fault["loc"])} for fault in found], from_json(body)) from error


async def _values(form: FormData, limit: int) -> dict[str, Any]:
    """The parts by name, each once; `limit`: bytes of the text."""
    values: dict[str, Any] = {}
    for latin1_name, part in form.multi_items():
        name = latin1_name.encode("latin-1").decode("utf-8", "replace")
        if name in values:
            raise Invalid(
                "invalid_request", "a part is sent twice", errors=[{"loc": ["body", name], "msg": "sent twice"}]
            )
        content = await _content(part, limit if name == "text" else None)
        # A file may begin with a byte-order mark.
        content = content.removeprefix(codecs.BOM_UTF8)
        values[name] = _parse(name, content) if name in _JSON_PARTS else _decode(name, content)
    return values


async def _content(part: str | UploadFile, limit: int | None) -> bytes:
    content = part.encode("latin-1") if isinstance(part, str) else await part.read()
    if limit is not None and len(content) > limit:
        raise TooLarge("text_too_large", f"the text has {len(content):,} bytes; this server takes at most {limit:,}")
    return content


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Invalid(
            "invalid_text",
            f"{name} is not UTF-8: byte {error.start} does not belong there",
            errors=[{"loc": ["body", name], "msg": "not UTF-8"}],
        ) from error


def _parse(name: str, content: bytes) -> Any:
    try:
        return from_json(content)
    except ValueError as error:
        raise Invalid(
            "invalid_request", f"{name} is not JSON: {error}", errors=[{"loc": ["body", name], "msg": str(error)}]
        ) from error
