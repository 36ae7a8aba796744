"""Through which proxy the clients connect: loopback through none, any other host through the environment's."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.client import AsyncClient, Client, Unreachable
from service.loopback import is_loopback
from tests.api import Api

FAR = "http://nanomoe.test:8000"


def _health(url: str) -> Any:
    with Client(url, retries=0) as client:
        return client.health()


def _health_awaited(url: str) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, retries=0) as client:
            return await client.health()

    return asyncio.run(ask())


Ask = Callable[[str], Any]


@pytest.fixture(params=[_health, _health_awaited], ids=["Client", "AsyncClient"])
def health(request: pytest.FixtureRequest) -> Ask:
    """Asks the service at an address for its health."""
    ask: Ask = request.param
    return ask


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


class RecordingProxy:
    """An HTTP proxy that answers every request itself, as a healthy service, and keeps what it was sent."""

    ANSWER = b'{"status": "ok", "version": "of the proxy"}'

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                sent = connection.recv(65536)
                if not sent:  # `close` only wanted to be let in
                    return
                self.requests.append(sent)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.ANSWER)}\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode() + self.ANSWER)

    def close(self) -> None:
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def proxy(no_proxies: None) -> Iterator[RecordingProxy]:
    running = RecordingProxy()
    yield running
    running.close()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_reached_without_a_proxy(
    health: Ask, host: str, variable: str, api: Api, proxy: RecordingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    assert health(api.url.replace("127.0.0.1", host)).version != "of the proxy"
    assert proxy.requests == []


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "socks4://127.0.0.1:9", "ftp://x", "::", "http://["])
def test_a_proxy_that_cannot_be_used_does_not_matter_on_loopback(
    health: Ask, value: str, api: Api, no_proxies: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    assert health(api.url).status == "ok"


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_another_host_is_reached_through_the_proxy(
    health: Ask, variable: str, scheme: str, proxy: RecordingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, scheme + proxy.address)
    assert health(FAR).version == "of the proxy"
    assert proxy.requests[0].startswith(f"GET {FAR}/healthz ".encode())


@pytest.mark.parametrize("exception", ["nanomoe.test", ".test", "*", "else.test, nanomoe.test:8000"])
def test_no_proxy_excludes_a_host(
    health: Ask, exception: str, proxy: RecordingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.address}")
    monkeypatch.setenv("NO_PROXY", exception)
    with pytest.raises(Unreachable):
        health(FAR)
    assert proxy.requests == []


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "ALL_PROXY",
            "socks5://me:secret@127.0.0.1:9",
            "ALL_PROXY names the socks5 proxy of nanomoe.test, ",
        ),
        ("HTTP_PROXY", "gopher://me:secret@proxy.test", "HTTP_PROXY is not the address of an http"),
        ("HTTP_PROXY", "http://me:secret@", "HTTP_PROXY is not the address of an http"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_where_it_would_be(
    health: Ask, variable: str, value: str, said: str, no_proxies: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.client.connection.find_spec", lambda name: None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=said) as refused:
        health(FAR)
    assert "secret" not in str(refused.value)


def test_a_proxy_for_https_does_not_matter_to_http(
    health: Ask, proxy: RecordingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.address)
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:9")
    assert health(FAR).version == "of the proxy"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("nanomoe.localhost", True),
        ("127.0.0.1", True),
        ("127.255.1.2", True),
        ("127.1", True),
        ("2130706433", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost.example.org", False),
        ("notlocalhost", False),
        ("127.0.0.1.example.org", False),
        ("0.0.0.0", False),  # noqa: S104 - to listen there is to listen to everybody
        ("::", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2001:db8::1", False),
        ("", False),
    ],
)
def test_names_of_loopback_are_recognised(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "x.localhost", "127.1", "[::1]", "0.0.0.0", "[::]"])  # noqa: S104
def test_no_notation_of_loopback_uses_a_proxy(
    health: Ask, host: str, proxy: RecordingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.address)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: nobody answers at this port
        with pytest.raises(Unreachable):
            health(f"http://{host}:{taken.getsockname()[1]}")
    assert proxy.requests == []


def test_a_redirect_to_elsewhere_is_not_followed(health: Ask) -> None:
    answer = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://nanomoe.test/\r\nContent-Length: 0\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def redirect() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=redirect)
        thread.start()
        with pytest.raises(Exception, match="answered 307"):
            health(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
