"""What both clients do with answers, failures and broken streams: the same tests for both, on a scripted service."""

import asyncio
import hashlib
import inspect
import json
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanomoe.config import JobConfig
from service import client as package
from service.client import (
    AsyncClient,
    AsyncJobHandle,
    Client,
    Conflict,
    Forbidden,
    Invalid,
    JobEvent,
    JobHandle,
    NotFound,
    Problem,
    Unavailable,
    UnexpectedAnswer,
    Unreachable,
)
from service.http import schemas

JOB_ID = "0" * 31 + "1"
Handler = Callable[[httpx.Request], httpx.Response]
Use = Callable[[Any], Any]


def job(status: str = "queued") -> dict[str, Any]:
    return {
        "id": JOB_ID,
        "name": None,
        "tags": {},
        "status": status,
        "created_at": "2026-01-01T00:00:00Z",
        "started_at": None,
        "finished_at": None,
        "attempt": 0,
        "status_reason": None,
        "priority": 0,
        "run_at": "2026-01-01T00:00:00Z",
        "execution": None,
        "progress": {},
        "config": JobConfig().model_dump(mode="json"),
        "model": {},
        "text": {"sha256": "0" * 64, "n_bytes": 9},
        "warnings": [],
        "error": None,
        "parent": None,
    }


def problem(status: int, code: str, headers: dict[str, str] | None = None) -> httpx.Response:
    body = {
        "type": "about:blank",
        "title": "No",
        "status": status,
        "detail": f"because of {code}",
        "code": code,
        "errors": [{"loc": ["body", "text"], "msg": "is empty"}],
    }
    return httpx.Response(status, json=body, headers=headers)


def use_client(handler: Handler, use: Use) -> Any:
    with Client("http://nanomoe.test", transport=httpx.MockTransport(handler)) as client:
        result = use(client)
        return list(result) if isinstance(result, Iterator) else result


def use_async_client(handler: Handler, use: Use) -> Any:
    async def run() -> Any:
        async with AsyncClient("http://nanomoe.test", transport=httpx.MockTransport(handler)) as client:
            result = use(client)
            return await result if isinstance(result, Coroutine) else [item async for item in result]

    return asyncio.run(run())


@pytest.fixture(params=[use_client, use_async_client], ids=["Client", "AsyncClient"])
def using(request: pytest.FixtureRequest) -> Callable[[Handler, Use], Any]:
    """Runs `use(client)` with one of the clients on a scripted service, and returns what comes out of it."""
    return request.param


def of_job(client: Any) -> Any:
    """The job's handle, without asking for it."""
    view = schemas.JobView.model_validate_json(json.dumps(job()))
    return JobHandle(client, view) if isinstance(client, Client) else AsyncJobHandle(client, view)


class Script:
    """Answers one request after another; an exception is raised instead."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_both_clients_offer_the_same() -> None:
    def public(kind: type) -> set[str]:
        return {name.removeprefix("a") if name == "aclose" else name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)
    assert public(JobHandle) == public(AsyncJobHandle)
    assert {name for name in package.__all__ if not hasattr(package, name)} == set()
    assert all(inspect.getdoc(getattr(kind, name)) for kind in (Client, JobHandle) for name in public(kind))


def test_methods_show_the_parameters_that_they_take() -> None:
    with Client("http://nanomoe.test") as client:
        assert list(inspect.signature(client.submit).parameters)[:3] == ["text", "config", "name"]
        assert list(inspect.signature(client.health).parameters) == []
        assert list(inspect.signature(of_job(client).metrics).parameters) == [
            "points",
            "from_step",
            "to_step",
            "tokens",
        ]


def test_a_handle_has_every_field_of_its_job() -> None:
    with Client("http://nanomoe.test") as client:
        handle = of_job(client)
        fields = [*schemas.JobView.model_fields, "is_terminal"]
        fields.remove("text")  # on a handle this asks for the training text
        for name in fields:
            assert getattr(handle, name) == getattr(handle.view, name), name


def test_the_default_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOMOE_URL", raising=False)
    assert Client().base_url == "http://127.0.0.1:8000"
    monkeypatch.setenv("NANOMOE_URL", "http://nanomoe.test/")
    assert Client().base_url == AsyncClient().base_url == "http://nanomoe.test"
    assert Client("http://127.0.0.1:9").base_url == "http://127.0.0.1:9"


def test_no_answer_is_an_error_with_the_address_and_how_to_set_another() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url, retries=0) as client, pytest.raises(Unreachable) as missed:
            client.health()
    assert str(missed.value) == f"nothing answers at {url}; another address is set with NANOMOE_URL"
    assert missed.value.address == url


def test_a_retried_submit_carries_the_key_of_the_first_try(using: Any) -> None:
    script = Script(httpx.ReadError("lost"), httpx.Response(201, json=job()))
    handle = using(script, lambda client: client.submit("texto", {"lr": 0.001}, name="n", tags={"a": "b"}))
    assert handle.id == JOB_ID
    first, second = script.requests
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert json.loads(first.content) == {"text": "texto", "config": {"lr": 0.001}, "name": "n", "tags": {"a": "b"}}


def test_two_submits_carry_different_keys(using: Any) -> None:
    keys = []

    def remember(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        return httpx.Response(201, json=job())

    using(remember, lambda client: client.submit("texto"))
    using(remember, lambda client: client.submit("texto"))
    using(remember, lambda client: client.submit("texto", idempotency_key="mine"))
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_a_config_object_sends_only_what_was_set(using: Any) -> None:
    script = Script(httpx.Response(201, json=job()))
    using(script, lambda client: client.submit("texto", JobConfig(epochs=3, betas=(0.8, 0.9))))
    assert json.loads(script.requests[0].content)["config"] == {"epochs": 3, "betas": [0.8, 0.9]}


def test_what_must_not_be_repeated_is_not(using: Any) -> None:
    script = Script(httpx.ReadError("lost"))
    with pytest.raises(Unreachable, match=r"http://nanomoe\.test"):
        using(script, lambda client: of_job(client).delete())
    assert len(script.requests) == 1


def test_a_request_that_was_never_sent_is_repeated_even_if_not_idempotent(using: Any) -> None:
    script = Script(httpx.ConnectError("refused"), httpx.Response(204))
    assert using(script, lambda client: of_job(client).delete()) is None
    assert len(script.requests) == 2


def test_retries_end_after_the_configured_number(using: Any) -> None:
    script = Script(*[httpx.ConnectError("refused")] * 4)
    with pytest.raises(Unreachable, match="nothing answers"):
        using(script, lambda client: client.health())
    assert script.answers == []


def test_retry_after_is_respected(using: Any) -> None:
    script = Script(problem(503, "database_unavailable", {"Retry-After": "0"}), httpx.Response(204))
    using(script, lambda client: of_job(client).delete())
    assert len(script.requests) == 2

    script = Script(problem(503, "database_unavailable", {"Retry-After": "3600"}))
    with pytest.raises(Unavailable) as caught:
        using(script, lambda client: client.health())
    assert caught.value.retry_after == 3600
    assert len(script.requests) == 1


def test_a_fault_of_the_service_is_not_repeated(using: Any) -> None:
    script = Script(problem(500, "internal"))
    with pytest.raises(Unavailable):
        using(script, lambda client: client.health())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Invalid),
        (413, Invalid),
        (422, Invalid),
        (401, Forbidden),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
    ],
)
def test_a_problem_is_raised_as_its_class_with_all_fields(using: Any, status: int, kind: type[Problem]) -> None:
    with pytest.raises(kind) as caught:
        using(Script(problem(status, "some_code")), lambda client: client.job(JOB_ID))
    error = caught.value
    assert (error.status, error.code, error.detail) == (status, "some_code", "because of some_code")
    assert error.errors[0].loc == ["body", "text"]


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, "<html>"), (404, "<html>"), (200, "{}"), (302, "")],
    ids=["html", "html 404", "another object", "redirect"],
)
def test_an_answer_of_another_program_is_an_error(using: Any, status: int, body: str) -> None:
    with pytest.raises(UnexpectedAnswer, match=r"http://nanomoe\.test"):
        using(Script(httpx.Response(status, text=body)), lambda client: client.job(JOB_ID))


@pytest.mark.parametrize("url", ["nanomoe", "ftp://nanomoe.test", "http://", "http://a\nb", "127.0.0.1:8000"])
def test_a_malformed_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        Client(url)


def test_an_unreachable_address_is_in_the_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url, retries=0) as client, pytest.raises(Unreachable, match=url):
            client.health()


def test_a_key_is_sent_with_every_request() -> None:
    script = Script(httpx.Response(200, json={"version": "1"}))
    with Client("http://nanomoe.test", key="secret", transport=httpx.MockTransport(script)) as client:
        client.health()
    assert script.requests[0].headers["Authorization"] == "Bearer secret"


def test_an_id_cannot_escape_its_path_segment(using: Any) -> None:
    script = Script(problem(404, "job_not_found"))
    with pytest.raises(NotFound):
        using(script, lambda client: client.job("../../workers?a=b"))
    assert script.requests[0].url.raw_path == b"/jobs/..%2F..%2Fworkers%3Fa%3Db"


def test_all_jobs_are_found_page_by_page(using: Any) -> None:
    script = Script(
        httpx.Response(200, json={"data": [job(), job()], "next_cursor": "abc"}),
        httpx.Response(200, json={"data": [job()], "next_cursor": None}),
    )
    assert len(using(script, lambda client: client.jobs(tag="a:b"))) == 3
    assert [dict(request.url.params) for request in script.requests] == [
        {"tag": "a:b"},
        {"tag": "a:b", "cursor": "abc"},
    ]


def test_a_handle_shows_the_job_as_last_seen(using: Any) -> None:
    async def later(handle: Any) -> Any:
        await handle.cancel()
        return handle

    def use(client: Any) -> Any:
        handle = of_job(client)
        if isinstance(client, AsyncClient):
            return later(handle)
        handle.cancel()
        return handle

    assert using(Script(httpx.Response(202, json=job("cancelled"))), use).view.status == "cancelled"


# Events


def sent(number: int | None, event: str, data: dict[str, Any]) -> bytes:
    identity = "" if number is None else f"id: {number}\n"
    return f"event: {event}\n{identity}data: {json.dumps(data)}\n\n".encode()


class Stream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The chunks of an answer, and then perhaps a broken connection."""

    def __init__(self, *chunks: bytes, breaks: bool = False) -> None:
        self.chunks = chunks
        self.breaks = breaks

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks
        if self.breaks:
            raise httpx.ReadError("reset by peer")

    async def __aiter__(self) -> Any:
        for chunk in self:
            yield chunk


RUNNING = sent(1, "status", {"status": "running"})
WARNING = sent(2, "warning", {"code": "dead_expert", "message": "expert 3"})
STEP = sent(None, "step", {"step": 7, "total_steps": 500})
SUCCEEDED = sent(3, "status", {"status": "succeeded"})


def told(events: list[JobEvent]) -> list[tuple[str, str | None]]:
    return [(event.kind, event.id) for event in events]


def test_events_resume_where_the_connection_broke(using: Any) -> None:
    script = Script(
        httpx.Response(200, stream=Stream(RUNNING, STEP, WARNING[:20], breaks=True)),
        httpx.ConnectError("restarting"),
        problem(503, "database_unavailable", {"Retry-After": "0"}),
        httpx.Response(200, stream=Stream(WARNING, b": ping\n\n")),
        httpx.Response(200, stream=Stream(sent(None, "newer_kind", {}), SUCCEEDED)),
    )
    events = using(script, lambda client: of_job(client).events())
    assert told(events) == [("status", "1"), ("step", None), ("warning", "2"), ("status", "3")]
    assert events[1].data.step == 7
    assert events[2].data.message == "expert 3"
    assert [request.headers.get("Last-Event-ID") for request in script.requests] == [None, "1", "1", "1", "2"]


def test_events_can_be_requested_after_an_id(using: Any) -> None:
    script = Script(httpx.Response(200, stream=Stream(SUCCEEDED)))
    assert told(using(script, lambda client: of_job(client).events("2"))) == [("status", "3")]
    assert script.requests[0].headers["Last-Event-ID"] == "2"


def test_204_ends_the_events(using: Any) -> None:
    assert using(Script(httpx.Response(204)), lambda client: of_job(client).events("3")) == []


def test_events_of_an_unknown_job_are_an_error(using: Any) -> None:
    with pytest.raises(NotFound):
        using(Script(problem(404, "job_not_found")), lambda client: of_job(client).events())


def test_an_event_that_cannot_be_read_is_an_error(using: Any) -> None:
    script = Script(httpx.Response(200, stream=Stream(b"event: status\ndata: {}\n\n")))
    with pytest.raises(UnexpectedAnswer, match="status event"):
        using(script, lambda client: of_job(client).events())


def test_wait_calls_back_with_each_event_and_returns_the_ended_job(using: Any) -> None:
    seen: list[str] = []
    script = Script(httpx.Response(200, stream=Stream(RUNNING, SUCCEEDED)), httpx.Response(200, json=job("succeeded")))
    ended = using(script, lambda client: of_job(client).wait(on_event=lambda event: seen.append(event.data.status)))
    assert seen == ["running", "succeeded"]
    assert ended.status == "succeeded"


# Streamed continuations


def piece(index: int, added: str, finish_reason: str | None = None) -> bytes:
    return sent(None, "chunk", {"index": index, "text": added, "tokens": [1], "finish_reason": finish_reason})


END = sent(
    None,
    "end",
    {
        "job_id": JOB_ID,
        "checkpoint": 50,
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "timing": {"queue_seconds": 0, "first_token_seconds": 0, "tok_per_sec": 1},
        "seed": 7,
        "window_slid": False,
        "numerics": "float32",
    },
)
DONE = b"data: [DONE]\n\n"


def test_a_continuation_comes_in_pieces(using: Any) -> None:
    script = Script(
        problem(503, "engine_starting", {"Retry-After": "0"}),
        httpx.Response(200, stream=Stream(piece(0, "ga"), piece(0, "to", "length") + END, DONE)),
    )
    pieces = using(script, lambda client: of_job(client).generate("O ", 50, stream=True, seed=7))
    assert "".join(piece.text for piece in pieces[:-1]) == "gato"
    assert (pieces[1].finish_reason, pieces[-1].seed) == ("length", 7)
    wanted = {"job_id": JOB_ID, "checkpoint": 50, "prompt": "O ", "stream": True, "seed": 7}
    assert json.loads(script.requests[1].content) == wanted


def test_a_continuation_that_fails_half_way_raises_its_problem(using: Any) -> None:
    failure = {"type": "about:blank", "title": "No", "status": 503, "detail": "died", "code": "engine_died"}
    script = Script(httpx.Response(200, stream=Stream(piece(0, "ga"), sent(None, "error", failure))))
    with pytest.raises(Unavailable) as caught:
        using(script, lambda client: of_job(client).generate("O ", stream=True))
    assert caught.value.code == "engine_died"


def test_a_continuation_that_breaks_off_is_an_error_and_not_repeated(using: Any) -> None:
    for stream in (Stream(piece(0, "ga"), END), Stream(piece(0, "ga"), breaks=True)):
        script = Script(httpx.Response(200, stream=stream))
        with pytest.raises(Unreachable):
            using(script, lambda client: of_job(client).generate("O ", stream=True))


# Downloads


def checkpoint(*names: str, content: bytes = b"weights") -> httpx.Response:
    sha256 = hashlib.sha256(content).hexdigest()
    return httpx.Response(
        200,
        json={
            "percent": 50,
            "step": 250,
            "epoch": 250,
            "created_at": "2026-01-01T00:00:00Z",
            "loss": 1.0,
            "perplexity": 2.7,
            "bits_per_byte": 1.0,
            "accuracy": 0.5,
            "files": [{"name": name, "size": len(content), "sha256": sha256} for name in names],
        },
    )


def test_a_download_that_breaks_starts_again(using: Any, tmp_path: Path) -> None:
    script = Script(
        checkpoint("model.safetensors"),
        httpx.Response(200, stream=Stream(b"wei", breaks=True)),
        httpx.Response(200, stream=Stream(b"wei", b"ghts")),
    )
    path = using(script, lambda client: of_job(client).download("latest", "model.safetensors", tmp_path))
    assert path == tmp_path / "model.safetensors"
    assert path.read_bytes() == b"weights"
    assert script.requests[2].url.path == f"/jobs/{JOB_ID}/checkpoints/50/files/model.safetensors"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("received", [b"weightz", b"weight"], ids=["a wrong byte", "a missing byte"])
def test_wrong_bytes_never_replace_the_file(using: Any, tmp_path: Path, received: bytes) -> None:
    there = tmp_path / "w"
    there.write_bytes(b"older")
    script = Script(checkpoint("model.safetensors"), httpx.Response(200, content=received))
    with pytest.raises(UnexpectedAnswer, match="other bytes"):
        using(script, lambda client: of_job(client).download(50, "model.safetensors", there))
    assert there.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "..", "a\\b", ""])
def test_a_file_s_name_cannot_escape_the_folder(using: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnexpectedAnswer, match="lists a file named"):
        using(Script(checkpoint(name)), lambda client: of_job(client).download_checkpoint(50, tmp_path / "new"))
