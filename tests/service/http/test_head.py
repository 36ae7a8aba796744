"""`HEAD` on every route that answers `GET`."""

from pathlib import Path
from queue import SimpleQueue
from typing import Any

from anyio import run, sleep_forever
from starlette.types import Message, Receive, Scope, Send

from service.http.head import HeadAsGet
from service.jobs import queue
from tests.api import Api
from tests.service.tiny_checkpoint import tiny_files

UNDOCUMENTED = ("/docs", "/openapi.json", "/static/vendor/README.md")
CHANGING = {"date", "content-length"}
"""`/metrics` counts requests, so that its length changes."""


def test_head_answers_as_get_without_the_content(api: Api, tmp_path: Path) -> None:
    claim = api.claim(api.submit()["id"])
    api.record_checkpoint(claim, 100, 500, tiny_files(tmp_path / "tiny"))
    queue.finish(api.db, claim, "succeeded")
    sweep = api.submit_sweep()
    api.http.post(f"/sweeps/{sweep['id']}/cancel")  # an endless stream is another test's
    filled = {
        "sweep_id": sweep["id"],
        "job_id": claim.job_id,
        "percent": "100",
        "name": "config.json",
        "model": claim.job_id,
    }
    documented = api.http.get("/openapi.json").json()["paths"]
    paths = [path.format(**filled) for path, operations in documented.items() if "get" in operations]
    paths.remove("/events")  # endless
    for path in [*paths, *UNDOCUMENTED, "/nope", f"/jobs/{'0' * 32}", "/jobs?limit=0"]:
        head, get = api.http.head(path), api.http.get(path)
        assert head.status_code == get.status_code, path
        assert head.content == b""
        told, wanted = ({k: v for k, v in one.headers.items() if k not in CHANGING} for one in (head, get))
        assert told == wanted, path
        if "content-length" in get.headers and path != "/metrics":
            assert head.headers["content-length"] == get.headers["content-length"], path


def test_head_of_an_endless_stream_ends(api: Api) -> None:
    job_id = api.submit()["id"]
    for path in (f"/jobs/{job_id}/events", "/events"):
        answer = api.http.head(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-accel-buffering"] == "no"
    # The connection can be used again: nothing of the stream follows.
    assert api.http.get("/healthz").json()["status"] == "ok"


def test_head_cancels_the_work_for_the_content() -> None:
    ended: SimpleQueue[str] = SimpleQueue()
    sent: list[Message] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        assert (scope["method"], scope["headers"]) == ("GET", [(b"host", b"x")])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await sleep_forever()
        finally:
            ended.put("cancelled")

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": "HEAD", "headers": [(b"host", b"x"), (b"range", b"bytes=0-1")]}
    run(HeadAsGet(endless), scope, receive, send)
    assert ended.get_nowait() == "cancelled"
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
