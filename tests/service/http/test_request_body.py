"""How a request's body may be coded, on every route that reads one."""

import gzip
import json
import zlib
from typing import Any

import pytest

from service.http.schemas import ScoreRequest
from tests.api import TEXT, Api

NOBODY = "0" * 32
JSON = {"Content-Type": "application/json"}
MARK = b"\xef\xbb\xbf"


Requests = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def requests(api: Api) -> Requests:
    """A body for each route that takes JSON; where a model is asked for, it is one that nobody has: read, and 404."""
    return {
        ("post", "/jobs"): {"text": TEXT},
        ("patch", "/jobs/{job_id}"): {"name": "gato", "job_id": api.submit()["id"]},
        ("post", "/sweeps"): {"text": TEXT, "seeds": 2},
        ("post", "/session"): {"key": "nmk_olá"},
        ("post", "/generate"): {"job_id": NOBODY, "prompt": "olá"},
        ("post", "/score"): {"job_id": NOBODY, "text": "olá"},
        ("post", "/inspect"): {"job_id": NOBODY, "prompt": "olá"},
        ("post", "/v1/completions"): {"model": NOBODY, "prompt": "olá"},
    }


ANSWERED = [(200, None), (201, None), (404, "job_not_found"), (404, "model_not_found"), (409, "no_keys")]
"""Status and code of the answers to a body that was read."""


def send(api: Api, method: str, path: str, body: bytes, job_id: str = "", **headers: str) -> tuple[int, str | None]:
    """The status and the code of an error."""
    content_type = headers.pop("content_type", "application/json")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = api.http.request(
        method, path.format(job_id=job_id), content=body, headers={"Content-Type": content_type, **named}
    )
    told = answer.json()
    return answer.status_code, told.get("error", told)["code"] if answer.status_code >= 400 else None


def of(request: dict[str, Any], path: str) -> tuple[bytes, str]:
    """A request's JSON, and the job in its path."""
    body = dict(request)
    job_id = body.pop("job_id") if "{" in path else ""
    return json.dumps(body, ensure_ascii=False).encode(), job_id


def test_every_route_with_a_body_is_covered(api: Api, requests: Requests) -> None:
    paths = api.http.get("/openapi.json").json()["paths"]
    assert set(requests) == {
        (method, path)
        for path, operations in paths.items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x-unknown", "identity, gzip"])
def test_a_compressed_body_is_415_at_every_route(api: Api, requests: Requests, coding: str) -> None:
    squeeze = {"gzip": gzip.compress, "deflate": zlib.compress}.get(coding, bytes)
    for (method, path), request in requests.items():
        body, job_id = of(request, path)
        told = send(api, method, path, squeeze(body), job_id, content_encoding=coding)
        assert told == (415, "unsupported_media_type"), path
    answer = api.http.post("/jobs", content=gzip.compress(b"{}"), headers=JSON | {"Content-Encoding": "gzip"})
    assert answer.headers["accept-encoding"] == "identity"
    assert "Content-Encoding" in answer.json()["detail"]


def test_a_compressed_form_is_415(api: Api) -> None:
    for path, form in (("/jobs", {"text": b"a b"}), ("/models", {"files": b"a b"})):
        answer = api.http.post(path, files=form, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415, path


@pytest.mark.parametrize("charset", ["latin-1", "iso-8859-1", "utf-16", '"utf-16le"', "windows-1252"])
def test_json_in_another_charset_is_415_at_every_route(api: Api, requests: Requests, charset: str) -> None:
    for (method, path), request in requests.items():
        body, job_id = of(request, path)
        told = send(api, method, path, body, job_id, content_type=f"application/json; charset={charset}")
        assert told == (415, "unsupported_media_type"), path


@pytest.mark.parametrize("content_type", ["application/json; charset=UTF-8", 'application/json;charset="utf8"'])
@pytest.mark.parametrize("mark", [b"", MARK])
def test_json_in_utf8_is_accepted_with_and_without_a_byte_order_mark(
    api: Api, requests: Requests, content_type: str, mark: bytes
) -> None:
    for (method, path), request in requests.items():
        body, job_id = of(request, path)
        told = send(api, method, path, mark + body, job_id, content_type=content_type, content_encoding="identity")
        assert told in ANSWERED, path


def test_a_byte_order_mark_that_arrives_byte_by_byte_is_dropped(api: Api) -> None:
    body = MARK + json.dumps({"text": TEXT}).encode()
    pieces = (body[place : place + 1] for place in range(len(body)))
    assert api.http.post("/jobs", content=pieces, headers=JSON).status_code == 201


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_utf16_is_refused_at_every_route(api: Api, requests: Requests, codec: str) -> None:
    for (method, path), request in requests.items():
        body, job_id = of(request, path)
        assert send(api, method, path, body.decode().encode(codec), job_id) == (400, "invalid_body"), path


@pytest.mark.parametrize("body", [MARK, MARK * 2 + b"{}", b" " + MARK + b"{}", b"\0", b"\xff\xfe"])
def test_a_byte_order_mark_alone_is_no_json(api: Api, requests: Requests, body: bytes) -> None:
    for (method, path), request in requests.items():
        _, job_id = of(request, path)
        status, code = send(api, method, path, body, job_id)
        assert (status, code) in [(400, "invalid_body"), (422, "invalid_request")], path


def test_a_byte_order_mark_is_no_part_of_a_text_or_of_a_form_part(api: Api) -> None:
    plain = api.http.post("/jobs", json={"text": TEXT, "name": "gato", "config": {"epochs": 3}}).json()
    mark, marked_text = MARK.decode(), MARK + TEXT.encode()
    by_json = api.http.post("/jobs", json={"text": mark + TEXT, "name": "gato", "config": {"epochs": 3}})
    by_form = api.http.post(
        "/jobs",
        files={"text": ("texto.txt", marked_text), "name": (None, MARK + b"gato"), "config": MARK + b'{"epochs": 3}'},
    )
    by_field = api.http.post("/jobs", files={"text": (None, marked_text), "config": (None, MARK + b'{"epochs": 3}')})
    for job in (by_json.json(), by_form.json(), by_field.json()):
        assert (job["text"], job["config"]["epochs"]) == (plain["text"], 3)
    assert by_form.json()["name"] == "gato"
    inside = api.http.post("/jobs", json={"text": f"a{mark}b"}).json()
    assert inside["text"]["n_bytes"] == 5


@pytest.mark.parametrize("filename", [None, "texto.txt"])
@pytest.mark.parametrize("part", ["text", "name"])
def test_a_part_that_is_not_utf8_is_refused_and_not_guessed_at(api: Api, part: str, filename: str | None) -> None:
    parts = {"text": (None, "olá mundo".encode()), part: (filename, "olá mundo".encode("latin-1"))}
    answer = api.http.post("/jobs", files=parts)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_text")
    assert answer.json()["errors"][0]["loc"] == ["body", part]


def test_a_field_is_read_as_the_same_text_as_a_file(api: Api) -> None:
    texts = [
        api.http.post("/jobs", files={"text": (filename, TEXT.encode())}).json()["text"] for filename in (None, "x")
    ]
    assert texts[0] == texts[1] == api.http.post("/jobs", json={"text": TEXT}).json()["text"]
    answer = api.http.post("/jobs", files={"text": (None, b"a b"), "não": (None, b"x")})
    assert answer.json()["errors"][0]["loc"] == ["body", "não"]


def test_a_byte_order_mark_alone_is_no_text(api: Api) -> None:
    answer = api.http.post("/jobs", json={"text": MARK.decode()})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_a_byte_order_mark_is_no_part_of_a_scored_text() -> None:
    assert ScoreRequest(job_id=NOBODY, text=MARK.decode() + TEXT).text == TEXT
