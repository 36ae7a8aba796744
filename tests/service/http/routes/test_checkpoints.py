"""Checkpoints, their reconstructions and their files, through a real server."""

import asyncio
import base64
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from email import message_from_bytes
from pathlib import Path

import pytest

from nanomoe.store.bucket import open_bucket
from service.access.keys import create_key
from service.client import AsyncClient, Client
from service.jobs import reads
from service.storage.opening import open_store
from tests.api import Api, Serve, serving, settings_of
from tests.buckets import Proxy, S3Server, failure, leading_to

WEIGHTS = bytes(range(256)) * 4


@pytest.fixture(scope="module", params=["folder", "bucket"])
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path
) -> Iterator[Api]:
    """A server whose files lie in its data folder, and one that streams them from a bucket."""
    with ExitStack() as opened:
        store = None
        if request.param == "bucket":
            server: S3Server = request.getfixturevalue("s3_server")
            opened.enter_context(leading_to(server.url, opened.enter_context(pytest.MonkeyPatch.context())))
            store = f"s3://{server.make_bucket()}/team"
        settings = settings_of(tmp_path_factory.mktemp("api"), migrated_sqlite, store=store)
        yield opened.enter_context(serving(settings))


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
    folder = api.context.store / reads.get_checkpoint(api.db, job_id, 100).folder
    folder.put("model.safetensors", WEIGHTS[:-1])
    (folder / "config.json").remove()
    for name in ("model.safetensors", "config.json"):
        answer = api.http.get(f"/jobs/{job_id}/checkpoints/100/files/{name}")
        assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_damaged")


def test_a_client_is_redirected_to_the_bucket_where_it_answers_as_the_service_does(
    serve: Serve, bucket_url: str
) -> None:
    api = serve(store=bucket_url, downloads="redirect")
    where = f"/jobs/{api.finished()}/checkpoints/100/files/model.safetensors"
    etag = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    first = api.http.get(where)
    assert (first.status_code, first.headers["etag"], first.content) == (307, etag, b"")
    assert "Expires=300&" in first.headers["location"]
    for headers, status, content in (
        ({}, 200, WEIGHTS),
        ({"Range": "bytes=5-9"}, 206, WEIGHTS[5:10]),
        ({"Range": "bytes=1000-"}, 206, WEIGHTS[1000:]),
    ):
        answer = api.http.get(where, headers=headers, follow_redirects=True)
        assert (answer.status_code, answer.content, len(answer.history)) == (status, content, 1), headers
    # What the bucket would answer otherwise, the service answers itself.
    for headers, status, length in (
        ({"If-None-Match": etag}, 304, 0),
        ({"If-Match": '"other"'}, 412, None),
        ({"If-Match": etag}, 200, 1024),
        ({"Range": "bytes=5000-"}, 416, None),
        ({"Range": "bytes=5-9", "If-Range": etag}, 206, 5),
        ({"Range": "bytes=5-9", "If-Range": '"other"'}, 200, 1024),
        ({"Range": "bytes=0-1,8-9"}, 206, None),
    ):
        answer = api.http.get(where, headers=headers)
        assert answer.status_code == status, headers
        assert length is None or len(answer.content) == length
    assert api.http.head(where).headers["content-length"] == "1024"


def test_the_clients_follow_a_redirect_and_do_not_show_the_bucket_their_key(
    serve: Serve, proxy: Proxy, s3_server: S3Server, tmp_path: Path
) -> None:
    api = serve(store=f"s3://{s3_server.make_bucket()}/team", downloads="redirect")
    job_id = api.finished()
    key = create_key(api.db, "ana", "admin").key

    async def downloaded() -> Path:
        async with AsyncClient(api.url, key=key) as client:
            return await (await client.job(job_id)).download(100, "model.safetensors", tmp_path / "second")

    with Client(api.url, key=key) as client:
        first = client.job(job_id).download(100, "model.safetensors", tmp_path / "first")
    assert first.read_bytes() == asyncio.run(downloaded()).read_bytes() == WEIGHTS
    signed = [request for request in proxy.requests if "X-Amz-Signature" in request.path]
    assert len(signed) == 2
    assert all("authorization" not in request.headers for request in signed)


def test_a_bucket_out_of_reach_is_a_503_that_names_no_address(serve: Serve, proxy: Proxy, s3_server: S3Server) -> None:
    api = serve(store=f"s3://{s3_server.make_bucket()}/team")
    where = f"/jobs/{api.finished()}/checkpoints/100/files/model.safetensors"
    open_bucket.cache_clear()
    object.__setattr__(api.context, "store", open_store(api.context.settings, retry_seconds=0.2))
    proxy.decide = lambda _: failure("503 Service Unavailable", "ServiceUnavailable")
    answer = api.http.get(where)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert "127.0.0.1" not in answer.text
    assert "Retry-After" in answer.headers
    proxy.decide = lambda _: failure("403 Forbidden", "AccessDenied")
    assert api.http.get(where).json()["code"] == "store_refused"
    proxy.decide = lambda _: None
    assert api.http.get(where).content == WEIGHTS
