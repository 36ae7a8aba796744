"""Checkpoints, their reconstructions and their files, through a real server."""

import base64
import hashlib

import pytest

from service import store
from tests.api import Api

WEIGHTS = bytes(range(256)) * 4


@pytest.fixture(scope="module")
def finished(api: Api) -> str:
    """The path of a job that has checkpoints at 0 and 100 percent."""
    return f"/jobs/{api.finished()}"


def test_checkpoints_are_listed_with_their_files(api: Api, finished: str) -> None:
    listed = api.http.get(f"{finished}/checkpoints").json()["data"]
    assert [checkpoint["percent"] for checkpoint in listed] == [0, 100]
    weights = next(file for file in listed[1]["files"] if file["name"] == "model.safetensors")
    assert weights == {"name": "model.safetensors", "size": 1024, "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    assert api.http.get(f"{finished}/checkpoints/100").json() == listed[1]
    assert api.http.get(f"{finished}/checkpoints/latest").json() == listed[1]


@pytest.mark.parametrize("which", ["50", "1", "-1", "x", "0x0", "LATEST", "%00", "1e2", "٢٥"])
def test_a_checkpoint_that_is_not_there_is_not_found(api: Api, finished: str, which: str) -> None:
    for rest in ("", "/reconstruction", "/files/config.json"):
        answer = api.http.get(f"{finished}/checkpoints/{which}{rest}")
        assert (answer.status_code, answer.json()["code"]) == (404, "checkpoint_not_found")


def test_a_reconstruction_is_paged_through(api: Api, finished: str) -> None:
    where = f"{finished}/checkpoints/latest/reconstruction"
    pages: list[str] = []
    start: int | None = 0
    while start is not None:
        page = api.http.get(where, params={"from": start, "count": 4}).json()
        pages.append("".join(token["target"] for token in page["data"]))
        start = page["next_from"]
    assert pages == ["bcde", "fghi", "j"]
    assert (page["from"], page["n_tokens"], page["truncated"], page["percent"]) == (8, 9, False, 100)
    assert api.http.get(where, params={"from": 10**6}).json()["data"] == []


@pytest.mark.parametrize("params", [{"from": -1}, {"count": 0}, {"from": 10**30}, {"start": 1}, {"from": "x"}])
def test_a_bad_page_is_refused(api: Api, finished: str, params: dict[str, str]) -> None:
    answer = api.http.get(f"{finished}/checkpoints/latest/reconstruction", params=params)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_a_file_comes_whole_and_with_its_digest(api: Api, finished: str) -> None:
    answer = api.http.get(f"{finished}/checkpoints/100/files/model.safetensors")
    assert answer.status_code == 200
    assert answer.content == WEIGHTS
    digest = base64.b64encode(hashlib.sha256(WEIGHTS).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
    assert answer.headers["content-length"] == "1024"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-9", 0, 10), ("bytes=1000-", 1000, 1024), ("bytes=-24", 1000, 1024), ("bytes=1020-5000", 1020, 1024)],
)
def test_a_file_comes_in_ranges(api: Api, finished: str, asked: str, start: int, end: int) -> None:
    where = f"{finished}/checkpoints/100/files/model.safetensors"
    answer = api.http.get(where, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == WEIGHTS[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/1024"


def test_a_range_goes_on_only_with_the_same_bytes(api: Api, finished: str) -> None:
    where = f"{finished}/checkpoints/100/files/model.safetensors"
    etag = api.http.get(where).headers["etag"]
    for known, status in ((etag, 206), ('"other"', 200)):
        assert api.http.get(where, headers={"Range": "bytes=5-", "If-Range": known}).status_code == status


@pytest.mark.parametrize("asked", ["bytes=1024-", "bytes=5-1", "bytes=x", "bytes=", "lines=1-2", "bytes=-0"])
def test_a_range_that_is_not_there_is_a_problem(api: Api, finished: str, asked: str) -> None:
    where = f"{finished}/checkpoints/100/files/model.safetensors"
    answer = api.http.get(where, headers={"Range": asked})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */1024"
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "manifest.json",
        "%2e%2e",
        "%2e%2e%2f%2e%2e%2fnanomoe.db",
        "..%5c..%5cx",
        "%00",
        "config.json%00",
        "config.json%0a",
        "c%C3%B3n",
        ".hidden",
        "a" * 3000,
    ],
)
def test_only_a_recorded_name_is_a_file(api: Api, finished: str, name: str) -> None:
    answer = api.http.get(f"{finished}/checkpoints/100/files/{name}")
    assert answer.status_code == 404
    assert answer.json()["code"] in {"file_not_found", "not_found"}


def test_a_file_that_is_gone_or_has_another_size_is_told(api: Api) -> None:
    job_id = api.finished()
    folder = api.context.settings.data_dir / store.get_checkpoint(api.db, job_id, 100).folder
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    (folder / "config.json").unlink()
    for name in ("model.safetensors", "config.json"):
        answer = api.http.get(f"/jobs/{job_id}/checkpoints/100/files/{name}")
        assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_damaged")
