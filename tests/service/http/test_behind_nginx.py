"""A default nginx in front of the service: a stream reaches the client event by event.

Each event but the first is sent only once the one before it has arrived: were nginx to collect them, none would come.
"""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest

from service.generation.admission import Summary
from service.generation.answers import Timing
from service.generation.messages import Chunk, EngineRequest
from tests.api import Api

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")
N_PIECES = 24

# Everything that is not said here is nginx's default, buffering above all.
CONFIG = """
daemon off;
worker_processes 1;
pid {prefix}/nginx.pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass {upstream}; }}
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def proxied(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client that speaks to the service through nginx."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    prefix, port = tmp_path_factory.mktemp("nginx"), free_port()
    config = prefix / "nginx.conf"
    config.write_text(CONFIG.format(prefix=prefix, port=port, upstream=api.url), "utf-8")
    nginx = subprocess.Popen([NGINX, "-e", "stderr", "-p", prefix, "-c", config])
    try:
        while not _accepts(port):
            assert nginx.poll() is None, "nginx did not start"
        # A piece that is held back fails the test by this timeout, far above what a piece takes.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            yield client
    finally:
        nginx.terminate()
        nginx.wait(30)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Pieces:
    """A generation whose chunks are let go one by one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._go = asyncio.Semaphore(1)

    async def stream(self, request: EngineRequest, **options: bool) -> AsyncGenerator[Chunk | Summary]:
        for number in range(N_PIECES):
            await self._go.acquire()
            yield Chunk(id=0, index=0, text=f"{number} ", tokens=(number,), logprobs=None, finish_reason=None)
        timing = Timing(queue_seconds=0, first_token_seconds=0, tok_per_sec=None)
        yield Summary(1, N_PIECES, window_slid=False, numerics="none", timing=timing)

    def let_go(self) -> None:
        self._loop.call_soon_threadsafe(self._go.release)


@pytest.mark.parametrize(("route", "job"), [("/generate", "job_id"), ("/v1/completions", "model")])
def test_generated_text_arrives_piece_by_piece(
    api: Api, proxied: httpx.Client, monkeypatch: pytest.MonkeyPatch, route: str, job: str
) -> None:
    pieces = Pieces(api.loop)
    monkeypatch.setattr(api.context.generation, "stream", pieces.stream)
    request: dict[str, Any] = {job: api.finished(), "prompt": "a", "stream": True}
    seen = 0
    with proxied.stream("POST", route, json=request) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if f'"text":"{seen} "' in line:
                seen += 1
                pieces.let_go()
    assert seen == N_PIECES


def test_a_jobs_events_arrive_as_they_happen(api: Api, proxied: httpx.Client) -> None:
    job_id = api.submit()["id"]
    seen = []
    with proxied.stream("GET", f"/jobs/{job_id}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                seen.append(line)
                if len(seen) == 1:
                    api.http.post(f"/jobs/{job_id}/cancel")
    assert len(seen) == 2


def test_every_stream_says_that_it_must_not_be_buffered(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = api.finished()
    sweep_id = api.submit_sweep()["id"]
    requests: dict[tuple[str, str], dict[str, Any] | None] = {
        ("get", "/jobs/{job_id}/events"): None,
        ("get", "/sweeps/{sweep_id}/events"): None,
        ("get", "/events"): None,
        ("post", "/generate"): {"job_id": job_id, "prompt": "a", "stream": True},
        ("post", "/v1/completions"): {"model": job_id, "prompt": "a", "stream": True},
    }
    documented = {
        (method, path)
        for path, operations in api.http.get("/openapi.json").json()["paths"].items()
        for method, operation in operations.items()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    }
    assert set(requests) == documented
    for (method, path), body in requests.items():
        monkeypatch.setattr(api.context.generation, "stream", Pieces(api.loop).stream)
        with api.http.stream(method, path.format(job_id=job_id, sweep_id=sweep_id), json=body) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8", path
            assert answer.headers["cache-control"] == "no-cache", path
            assert answer.headers["x-accel-buffering"] == "no", path
