"""Checkpoints, their reconstructions and their files, through a real server."""

import base64
import hashlib
from email import message_from_bytes

import pytest

from service.jobs import reads
from tests.api import Api

WEIGHTS = bytes(range(256)) * 4


@pytest.fixture(scope="module")
def finished(api: Api) -> str:
    """The path of a job that has checkpoints at 0 and 100 percent."""
    return f"/jobs/{api.finished()}"


def test_the_first_checkpoint_with_the_lowest_validation_loss_is_marked(api: Api) -> None:
    claim = api.running()
    for percent, val_loss in {25: 2.5, 50: 2.0, 75: 2.0, 100: 2.2}.items():
        api.record_checkpoint(claim, percent, 5 * percent, val_loss=val_loss)
    job = f"/jobs/{claim.job_id}"
    marked = {0: None, 25: False, 50: True, 75: False, 100: False}  # percent 0 has no validation loss
    answers = [api.http.get(f"{job}/checkpoints").json()["data"], api.http.get(f"{job}/metrics").json()["checkpoints"]]
    for listed in answers:
        assert {one["percent"]: one["best"] for one in listed} == marked
    assert {p: api.http.get(f"{job}/checkpoints/{p}").json()["best"] for p in marked} == marked


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


def test_a_file_is_sent_completely_and_with_its_digest(api: Api, finished: str) -> None:
    answer = api.http.get(f"{finished}/checkpoints/100/files/model.safetensors")
    assert answer.status_code == 200
    assert answer.content == WEIGHTS
    digest = base64.b64encode(hashlib.sha256(WEIGHTS).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
    assert answer.headers["content-length"] == "1024"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=1000-", 1000, 1024),
        ("bytes=-24", 1000, 1024),
        ("bytes=-5000", 0, 1024),
        ("bytes=1020-5000", 1020, 1024),
        ("Bytes = 0-9", 0, 10),
        (f"bytes=1020-{'9' * 5000}", 1020, 1024),
        ("bytes=5000-,0-9", 0, 10),
        ("bytes=,0-9,", 0, 10),
        ("bytes=0-5,4-9", 0, 10),
    ],
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
    date = api.http.get(where).headers["last-modified"]
    for known, status in (
        (etag, 206),
        (date, 206),
        ('"other"', 200),
        (f"W/{etag}", 200),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 200),
        ("", 200),
    ):
        for asked in ("bytes=5-", "bytes=5000-"):
            answer = api.http.get(where, headers={"Range": asked, "If-Range": known})
            assert answer.status_code == (416 if (status, asked) == (206, "bytes=5000-") else status), known


def test_a_file_comes_in_several_ranges_at_once(api: Api, finished: str) -> None:
    where = f"{finished}/checkpoints/100/files/model.safetensors"
    answer = api.http.get(where, headers={"Range": "bytes=0-1,5000-,-2"})
    assert answer.status_code == 206
    assert answer.headers["content-length"] == str(len(answer.content))
    parts = message_from_bytes(b"Content-Type: " + answer.headers["content-type"].encode() + b"\n\n" + answer.content)
    assert [
        (part["content-range"], part.get_payload(decode=True)) for part in parts.walk() if not part.is_multipart()
    ] == [
        ("bytes 0-1/1024", b"\x00\x01"),
        ("bytes 1022-1023/1024", b"\xfe\xff"),
    ]


@pytest.mark.parametrize("asked", ["lines=1-2", "x", "bytes", "bytes 0-9", "=0-9", "bytes2=0-9"])
def test_a_range_in_an_unknown_unit_is_ignored(api: Api, finished: str, asked: str) -> None:
    answer = api.http.get(f"{finished}/checkpoints/100/files/model.safetensors", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, WEIGHTS)


@pytest.fixture(scope="module", params=["checkpoints/100/files/model.safetensors", "text"])
def kept(request: pytest.FixtureRequest, api: Api, finished: str) -> str:
    """The path of something that a client may keep."""
    return f"{finished}/{request.param}"


def test_content_that_a_client_has_is_not_sent_again(api: Api, kept: str) -> None:
    whole = api.http.get(kept)
    etag = whole.headers["etag"]
    for held in (etag, f"W/{etag}", f'"other", {etag}', f'"other",W/{etag}', "*"):
        for method in ("GET", "HEAD"):
            answer = api.http.request(method, kept, headers={"If-None-Match": held, "Range": "bytes=5000-"})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag), held
            assert answer.headers["cache-control"] == "no-cache"
            assert "content-length" not in answer.headers
    for other in ('"other"', etag.strip('"'), f'"x{etag[1:]}', "", '"*"'):
        answer = api.http.get(
            kept, headers={"If-None-Match": other, "If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
        )
        assert (answer.status_code, answer.content) == (200, whole.content), other


def test_a_condition_that_is_not_met_is_412(api: Api, kept: str) -> None:
    etag = api.http.get(kept).headers["etag"]
    for asked, status in [(etag, 200), ("*", 200), (f'"other", {etag}', 200), ('"other"', 412), (f"W/{etag}", 412)]:
        answer = api.http.get(kept, headers={"If-Match": asked})
        assert answer.status_code == status, asked
        if status == 412:
            assert answer.json()["code"] == "precondition_failed"
    assert api.http.head(kept, headers={"If-Match": '"other"'}).status_code == 412


def test_a_file_answers_conditions_on_its_date(api: Api, finished: str) -> None:
    where = f"{finished}/checkpoints/100/files/model.safetensors"
    date = api.http.get(where).headers["last-modified"]
    before, after = "Thu, 01 Jan 1970 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"
    for header, given, status in [
        ("If-Modified-Since", date, 304),
        ("If-Modified-Since", after, 304),
        ("If-Modified-Since", before, 200),
        ("If-Modified-Since", "yesterday", 200),
        ("If-Unmodified-Since", date, 200),
        ("If-Unmodified-Since", before, 412),
        ("If-Unmodified-Since", "yesterday", 200),
    ]:
        assert api.http.get(where, headers={header: given}).status_code == status, (header, given)


def test_the_head_of_a_file_tells_its_size_and_reads_no_range(api: Api, finished: str) -> None:
    where = f"{finished}/checkpoints/100/files/model.safetensors"
    for headers in ({}, {"Range": "bytes=0-9"}, {"Range": "bytes=5000-"}, {"Range": "bytes=0-9", "If-Range": '"x"'}):
        answer = api.http.head(where, headers=headers)
        assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "1024", b"")
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=1024-",
        "bytes=5-1",
        "bytes=x",
        "bytes=",
        "bytes=-0",
        "bytes=-",
        "bytes=0-1,x",
        "bytes=1024-,2000-",
        "bytes=1--2",
        "bytes=+1-2",
    ],
)
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


def test_a_missing_file_or_one_of_another_size_is_a_conflict(api: Api) -> None:
    job_id = api.finished()
    folder = api.context.settings.data_dir / reads.get_checkpoint(api.db, job_id, 100).folder
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    (folder / "config.json").unlink()
    for name in ("model.safetensors", "config.json"):
        answer = api.http.get(f"/jobs/{job_id}/checkpoints/100/files/{name}")
        assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_damaged")
