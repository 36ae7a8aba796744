"""Submitting jobs, through a real server."""

import asyncio
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from structlog.testing import capture_logs

from nanomoe.config import JobConfig
from nanomoe.model import size
from nanomoe.tokenizer import load_tokenizer
from service.jobs import queue, reads
from tests.api import TEXT, Api, Serve
from tests.service.http.routes.problem_code import code

NOBODY = "0" * 32


def n_jobs(api: Api) -> int:
    return sum(reads.count_jobs(api.db).values())


def test_a_text_alone_is_the_reference_run(api: Api) -> None:
    answer = api.http.post("/jobs", json={"text": TEXT})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["config"]["epochs"] == 500
    assert job["config"]["tokenizer"] == "ptbr-8k"
    assert job["progress"]["total_steps"] == 500
    assert job["text"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert job["text"]["n_bytes"] == len(TEXT.encode())
    assert job["model"]["n_params"] == job["model"]["n_active_params"] > 1_000_000
    assert job["created_at"].endswith("Z")


def test_a_form_submits_the_same_job_as_json(api: Api) -> None:
    changes = {"config": {"epochs": 3, "lr": 0.01}, "tags": {"course": "nlp-101"}, "priority": 2}
    as_json = api.submit(name="gato", **changes)
    form = {
        "config": (None, '{"epochs": 3, "lr": 0.01}'),
        "tags": (None, '{"course": "nlp-101"}'),
        "priority": (None, "2"),
        "name": (None, "gato"),
    }
    for text in (("text.txt", TEXT.encode()), (None, TEXT)):
        answer = api.http.post("/jobs", files={**form, "text": text})
        assert answer.status_code == 201
        same = {"name", "tags", "priority", "text"}
        assert {key: answer.json()[key] for key in same} == {key: as_json[key] for key in same}
        assert answer.json()["config"] == as_json["config"] | {"tokenizer": "ptbr-8k"}


def test_a_dry_run_measures_and_leaves_no_row(api: Api) -> None:
    before = n_jobs(api)
    answer = api.http.post(
        "/jobs", params={"dry_run": True}, json={"text": "ab" * 40, "config": {"tokenizer": "bytes"}}
    )
    estimate = answer.json()
    assert answer.status_code == 200
    assert estimate["quarters"] == {"0": 0, "25": 125, "50": 250, "75": 375, "100": 500}
    assert estimate["text"]["n_tokens"] == 80
    assert estimate["training_bytes"] > 4 * 4 * estimate["model"]["n_params"]
    assert n_jobs(api) == before


def test_a_text_over_256_kib_is_tokenised_later(api: Api) -> None:
    text = "palavra " * 40_000
    job = api.submit(text=text, config={"tokenizer": "train:300"})
    assert job["text"] == {"sha256": hashlib.sha256(text.encode()).hexdigest(), "n_bytes": len(text), "n_tokens": None}
    assert job["progress"]["total_steps"] is None
    assert job["model"] == {"n_params": None, "n_active_params": None}  # the text may have fewer than 300 entries


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"{", 400, "invalid_body"),
        (b"", 400, "invalid_body"),
        (b"[" * 100_000, 400, "invalid_body"),
        (b'{"text": "ab", "config": {"seed": ' + b"9" * 10_000 + b"}}", 400, "invalid_body"),
        (b'{"text": "\xff\xfe"}', 400, "invalid_body"),
        (b'{"text": "\\ud800 a"}', 422, "invalid_text"),
        (b'{"text": "\\udc00\\ud800"}', 422, "invalid_text"),
        (b"null", 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b"{}", 422, "invalid_request"),
        (b'{"text": ""}', 422, "invalid_request"),
        (b'{"text": "a"}', 422, "text_too_short"),
        (b'{"text": 5}', 422, "invalid_request"),
        (b'{"text": "ab", "epochs": 5}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"lr": NaN}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"lr": Infinity}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"lr": 1e400}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"lr": "0.1"}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"epochs": true}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"epochs": 1.5}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"epochs": 0}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"n_embd": 10, "n_head": 3}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"nope": 1}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": null}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"tokenizer": "../../etc/passwd"}}', 422, "tokenizer_name_invalid"),
        (b'{"text": "ab", "config": {"tokenizer": "/etc"}}', 422, "tokenizer_name_invalid"),
        (b'{"text": "ab", "config": {"tokenizer": "owner/name"}}', 422, "hub_not_allowed"),
        (b'{"text": "ab", "config": {"tokenizer": "train:99999999999"}}', 422, "tokenizer_name_invalid"),
        (b'{"text": "ab", "config": {"n_embd": 65536, "n_layer": 256}}', 422, "job_too_large"),
        (b'{"text": "ab", "config": {"tokenizer": "bytes", "epochs": 10000000, "n_experts": 4096}}', 201, ""),
        (b'{"text": "ab", "name": "a\\u0000b"}', 422, "invalid_request"),
        (b'{"text": "ab", "name": "a\\nb"}', 422, "invalid_request"),
        (b'{"text": "ab", "tags": {"a\\"b": "c"}}', 422, "invalid_request"),
        (b'{"text": "ab", "tags": {"a": 5}}', 422, "invalid_request"),
        (b'{"text": "ab", "priority": 101}', 422, "invalid_request"),
        (b'{"text": "ab", "run_at": "2030-01-01"}', 422, "invalid_request"),
        (b'{"text": "ab", "run_at": "2030-01-01T00:00:00"}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"init_from": {"job_id": "../x"}}}', 404, "job_not_found"),
        (b'{"text": "ab", "config": {"init_from": {"job_id": ""}}}', 422, "invalid_request"),
        (b'{"text": "ab", "config": {"init_from": {"job_id": "%s"}}}' % NOBODY.encode(), 404, "job_not_found"),
    ],
)
def test_a_bad_request_gets_its_code_and_leaves_no_row(api: Api, body: bytes, status: int, expected: str) -> None:
    before = n_jobs(api)
    answer = api.http.post("/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    if status == 201:
        assert n_jobs(api) == before + 1
    else:
        assert code(answer) == expected
        assert n_jobs(api) == before
        assert len(answer.content) < 20_000


@pytest.mark.parametrize(
    ("parts", "status", "expected"),
    [
        ([("text", b"ab"), ("text", b"cd")], 422, "invalid_request"),
        ([("text", b"ab"), ("nope", b"1")], 422, "invalid_request"),
        ([("config", b"{}")], 422, "invalid_request"),
        ([("text", b"ab"), ("config", b"{")], 422, "invalid_request"),
        ([("text", b"ab"), ("config", b'{"lr": NaN}')], 422, "invalid_request"),
        ([("text", b"ab"), ("config", b"[" * 100_000)], 422, "invalid_request"),
        ([("text", b"\xff\xfe")], 422, "invalid_text"),
        ([("text", b"ab")] * 40, 400, "invalid_body"),
    ],
)
def test_a_bad_form_gets_its_code_and_leaves_no_row(
    api: Api, parts: list[tuple[str, bytes]], status: int, expected: str
) -> None:
    before = n_jobs(api)
    answer = api.http.post("/jobs", files=[(name, ("file", content)) for name, content in parts])
    assert (answer.status_code, code(answer)) == (status, expected)
    assert n_jobs(api) == before


def test_a_form_that_is_cut_off_or_has_no_boundary_is_refused(api: Api) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=x"):
        answer = api.http.post(
            "/jobs", content=b"--x\r\nContent-Disposition: form", headers={"content-type": content_type}
        )
        assert answer.status_code in (400, 422)
        assert code(answer) in {"invalid_body", "invalid_request"}


def test_another_kind_of_body_is_refused(api: Api) -> None:
    answer = api.http.post("/jobs", data={"text": TEXT})
    assert (answer.status_code, code(answer)) == (415, "unsupported_media_type")


def test_an_error_does_not_repeat_long_input(api: Api) -> None:
    answer = api.http.post("/jobs", json={"text": "ab", "config": {"x" * 100_000: 1}, "y" * 100_000: [1] * 1000})
    assert code(answer) == "invalid_request"
    assert len(answer.content) < 3000


def test_every_fault_is_named_with_its_location(api: Api) -> None:
    answer = api.http.post("/jobs", json={"text": "ab", "config": {"lr": -1, "nope": 1}})
    assert [error["loc"] for error in answer.json()["errors"]] == [["body", "config", "lr"], ["body", "config", "nope"]]


def test_a_body_over_the_limit_is_refused_before_it_is_read(serve: Serve) -> None:
    api = serve(max_text_bytes=1000)
    answer = api.http.post("/jobs", json={"text": "a" * 1001})
    assert (answer.status_code, code(answer)) == (413, "text_too_large")
    for part in (("t", b"a" * 1001), (None, b"a" * 1001)):  # a file, a field
        answer = api.http.post("/jobs", files={"text": part})
        assert (answer.status_code, code(answer)) == (413, "text_too_large")
    huge = b'{"text": "' + b"a" * 2_000_000
    answer = api.http.post("/jobs", content=huge, headers={"content-type": "application/json"})
    assert (answer.status_code, code(answer)) == (413, "body_too_large")
    pieces = (huge[start : start + 100_000] for start in range(0, len(huge), 100_000))
    answer = api.http.post("/jobs", content=pieces, headers={"content-type": "application/json"})
    assert (answer.status_code, code(answer)) == (413, "body_too_large")
    assert n_jobs(api) == 0


@pytest.mark.parametrize("name", ["config.json", None])
def test_only_the_text_is_held_to_the_limit_of_the_text(serve: Serve, name: str | None) -> None:
    api = serve(max_text_bytes=1000)

    def submit(config: str) -> httpx.Response:
        return api.http.post("/jobs", files={"text": (None, TEXT), "config": (name, config)})

    config = json.dumps({"tokenizer": "bytes"})
    assert submit(config + " " * 1000).status_code == 201
    assert api.http.post("/jobs", json={"text": TEXT, "config": json.loads(config)}).status_code == 201
    answer = submit(config + " " * 2_000_000)
    assert (answer.status_code, code(answer)) == (413, "body_too_large")


def test_a_text_of_exactly_the_limit_fits_even_when_every_byte_is_escaped(serve: Serve) -> None:
    api = serve(max_text_bytes=300_000)
    escaped = b'{"config": {"tokenizer": "bytes", "epochs": 1}, "text": "' + b"\\u0061" * 300_000 + b'"}'
    answer = api.http.post("/jobs", content=escaped, headers={"content-type": "application/json"})
    assert answer.status_code == 201


@pytest.mark.parametrize(
    ("limit", "figure"),
    [({"max_params": 1000}, "parameters"), ({"max_training_bytes": 1000}, "bytes"), ({"max_steps": 10}, "steps")],
)
def test_a_job_over_a_limit_of_the_server_is_refused_with_the_figures(
    serve: Serve, limit: dict[str, int], figure: str
) -> None:
    answer = serve(**limit).http.post("/jobs", json={"text": TEXT})
    assert (answer.status_code, code(answer)) == (422, "job_too_large")
    assert figure in answer.json()["detail"]
    assert f"{next(iter(limit.values())):,}" in answer.json()["detail"]


def test_the_queue_has_a_length(serve: Serve) -> None:
    api = serve(max_queued=1)
    api.submit()
    answer = api.http.post("/jobs", json={"text": TEXT})
    assert (answer.status_code, code(answer)) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) > 0


def test_the_same_key_and_request_is_the_same_job(api: Api) -> None:
    headers = {"Idempotency-Key": uuid4().hex}
    first = api.http.post("/jobs", json={"text": TEXT, "config": {"epochs": 5, "lr": 0.1}}, headers=headers)
    other_spelling = f'{{"config": {{"lr": 1e-1, "epochs": 5}}, "text": {json.dumps(TEXT)}}}'
    again = api.http.post("/jobs", content=other_spelling, headers=headers | {"content-type": "application/json"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    for other in ({"text": TEXT + "!"}, {"text": TEXT, "name": "other"}, {"text": TEXT, "tags": {"a": "b"}}):
        answer = api.http.post("/jobs", json=other, headers=headers)
        assert (answer.status_code, code(answer)) == (422, "idempotency_key_reused")


def test_the_same_number_in_another_notation_is_the_same_job(api: Api) -> None:
    headers = {"Idempotency-Key": uuid4().hex, "Content-Type": "application/json"}
    answers = [
        api.http.post(
            "/jobs", content=f'{{"text": "a b", "config": {{"epochs": {epochs}, "seed": 7}}}}', headers=headers
        )
        for epochs in ("50", "50.0", "5e1")
    ]
    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert '"epochs":50,' in answers[1].text


def test_fifty_submits_at_once_with_one_key_are_one_job(api: Api) -> None:
    headers = {"Idempotency-Key": uuid4().hex}
    before = n_jobs(api)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: api.http.post("/jobs", json={"text": TEXT}, headers=headers), range(50)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 49 + [201]
    assert n_jobs(api) == before + 1


@pytest.mark.parametrize("key", ["", "a b", "a" * 201, "ç"])
def test_a_key_that_is_no_token_is_refused(api: Api, key: str) -> None:
    answer = api.http.post("/jobs", json={"text": TEXT}, headers=[(b"Idempotency-Key", key.encode())])
    assert (answer.status_code, code(answer)) == (422, "invalid_request")


def test_a_parent_that_is_missing_or_does_not_fit_is_refused(api: Api) -> None:
    parent, damaged = api.finished(), api.finished()
    recorded = reads.get_checkpoint(api.db, damaged, 100)
    (api.context.settings.data_dir / recorded.folder / "tokenizer.json").write_bytes(b"{}")
    claim = api.running()
    api.record_checkpoint(claim, 100, 500, {"model.safetensors": b"weights"})
    queue.finish(api.db, claim, "succeeded")
    without_tokenizer = claim.job_id
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"n_layer": 2, "init_from": {"job_id": parent}}, 422, "parent_does_not_fit"),
        ({"init_from": {"job_id": parent, "checkpoint": 50}}, 404, "checkpoint_not_found"),
        ({"init_from": {"job_id": damaged}}, 409, "checkpoint_damaged"),
        ({"init_from": {"job_id": without_tokenizer}}, 409, "checkpoint_damaged"),
    ]
    for config, status, expected in cases:
        answer = api.http.post("/jobs", json={"text": TEXT, "config": {"tokenizer": "bytes", **config}})
        assert (answer.status_code, code(answer)) == (status, expected)


def test_a_child_counts_with_the_tokenizer_in_its_parents_files_and_its_dry_run_says_the_same(api: Api) -> None:
    parents = load_tokenizer("train:300", text="outro texto, outro texto, e mais outro texto")
    claim = api.running(config={"tokenizer": "train:300"})
    api.record_checkpoint(claim, 100, 500, parents.files())
    queue.finish(api.db, claim, "succeeded")
    config = JobConfig.model_validate({"tokenizer": "train:300", "init_from": {"job_id": claim.job_id}})
    request = {"text": TEXT, "config": config.model_dump(mode="json")}
    dry = api.http.post("/jobs", params={"dry_run": True}, json=request).json()
    made = api.http.post("/jobs", json=request).json()
    assert dry["text"] == made["text"]
    assert (
        made["text"]["n_tokens"]
        == len(parents.encode(TEXT))
        != len(load_tokenizer("train:300", text=TEXT).encode(TEXT))
    )
    assert dry["model"] == made["model"]
    assert made["model"]["n_params"] == size.n_params(config, parents.vocab_size)
    assert dry["total_steps"] == made["progress"]["total_steps"]
    assert dry["warnings"] == made["warnings"]
    too_small = api.http.post(
        "/jobs", json={"text": "outro texto", "config": request["config"] | {"val_fraction": 0.9}}
    )
    assert (too_small.status_code, code(too_small)) == (422, "text_too_short")  # 11 bytes would do


def test_a_folder_with_a_tokenizer_may_be_named_when_the_server_says_where(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizers" / "meu"
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer("ptbr-8k")
    tokenizer.save(folder)
    api = serve(tokenizer_dir=tmp_path / "tokenizers")
    assert api.submit(config={"tokenizer": "meu"})["text"]["n_tokens"] == len(tokenizer.encode(TEXT))


@pytest.mark.parametrize(
    ("kind", "sent"), [("application/json", b'{"te'), ("multipart/form-data; boundary=x", b"--x\r\nCon")]
)
def test_a_client_that_disconnects_during_its_upload_is_no_error(api: Api, kind: str, sent: bytes) -> None:
    heard = iter([{"type": "http.request", "body": sent, "more_body": True}, {"type": "http.disconnect"}])
    said: list[Any] = []

    async def receive() -> Any:
        return next(heard)

    async def send(message: Any) -> None:
        said.append(message)

    headers = {"host": "localhost", "content-type": kind, "content-length": "100"}
    scope = {
        "type": "http", "method": "POST", "path": "/jobs", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    with capture_logs() as logged:
        asyncio.run_coroutine_threadsafe(api.server.config.app(scope, receive, send), api.loop).result(30)
    assert said[0]["status"] == 499
    assert logged == []
