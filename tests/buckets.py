"""A bucket for tests: a real server that speaks S3, in a process of its own, and a proxy before it that can fail.

The server (moto) starts with the first test that needs it, one for each test process; each test has a bucket of its
own. It keeps everything in memory, and checks no credentials.
"""

import select
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO
from uuid import uuid4

import httpx
import pytest

from nanomoe.store import bucket

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    url: str

    def make_bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"bucket-{uuid4().hex}"
        httpx.put(f"{self.url}/{name}").raise_for_status()
        return name

    def keys(self, name: str) -> list[str]:
        """Every key of a bucket, as the server lists them."""
        text = httpx.get(f"{self.url}/{name}?list-type=2").text
        return [part.partition("</Key>")[0] for part in text.split("<Key>")[1:]]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """A new server, until the end of the block."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "Running on http" in line:
                url = line.split("Running on ")[1].split()[0]
                break
        else:
            raise AssertionError("the server did not start")
        # It logs every request: a full pipe would stop it.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield S3Server(url)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def aws(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, to which the AWS variables of this process and of those that it starts lead."""
    with leading_to(s3_server.url, monkeypatch):
        yield s3_server


@contextmanager
def leading_to(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The AWS variables name this endpoint; what was opened for another is forgotten."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    bucket.open_bucket.cache_clear()
    yield
    bucket.open_bucket.cache_clear()


@pytest.fixture
def bucket_url(aws: S3Server) -> str:
    """The URL of a folder in a new bucket."""
    return f"s3://{aws.make_bucket()}/team"


@dataclass(frozen=True)
class Request:
    """What came to the proxy."""

    method: str
    path: str
    headers: dict[str, str]


Answer = bytes | float | None
"""An HTTP response to give instead, seconds to wait before the request is passed on, or None to pass it on."""


class Proxy:
    """Passes requests on to a server, unless `decide` says otherwise. Each request has a connection of its own."""

    def __init__(self, server: S3Server) -> None:
        self._host, self._port = server.url.removeprefix("http://").split(":")
        self.decide: Callable[[Request], Answer] = lambda _: None
        self.requests: list[Request] = []
        self._closing = threading.Event()
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):  # who asked is gone
                    # A client may keep a connection for later, on which it has asked for nothing yet.
                    while not select.select([self.connection], [], [], 0.2)[0]:
                        if proxy._closing.is_set():
                            return
                    proxy._serve(self.rfile, self.wfile)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # waits for the requests that are being handled

    def _serve(self, rfile: BinaryIO, wfile: BinaryIO) -> None:
        lines = list(iter(rfile.readline, b"\r\n"))
        if not lines or lines[-1] == b"":
            return
        method, path, _ = lines[0].decode().split()
        pairs = (line.decode().partition(":") for line in lines[1:])
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        body = rfile.read(int(headers.get("content-length", 0)))
        asked = Request(method, path, headers)
        self.requests.append(asked)
        answer = self.decide(asked)
        if isinstance(answer, float):
            self._closing.wait(answer)
        if isinstance(answer, bytes):
            wfile.write(answer)
            return
        with socket.create_connection((self._host, int(self._port))) as server:
            server.sendall(b"".join(lines) + b"Connection: close\r\n\r\n" + body)
            while piece := server.recv(1 << 16):
                wfile.write(piece)


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, to which the AWS variables lead."""
    running = Proxy(s3_server)
    with leading_to(running.url, monkeypatch):
        yield running
    running.close()


def failure(status: str, code: str) -> bytes:
    """The response of a store that fails."""
    body = f"<Error><Code>{code}</Code></Error>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
