"""What the tests of the API's side of generation do again and again."""

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.errors import ServiceError
from service.generation.admission import Generation
from service.generation.messages import Chunk
from service.settings import Settings
from tests.service.tiny_checkpoint import TinyCheckpoint

Run = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine in the event loop of a test file."""


def settings(**fields: object) -> Settings:
    """Settings that no file or variable changes."""
    return Settings(_env_file=None, engine_threads=1, **fields)  # type: ignore[arg-type, call-arg]


async def failure(work: Coroutine[Any, Any, object]) -> ServiceError:
    """The error that a request ends with."""
    with pytest.raises(ServiceError) as raised:
        await work
    return raised.value


async def first_chunk(generation: Generation, tiny: TinyCheckpoint) -> contextlib.AbstractAsyncContextManager[Any]:
    """A long stream of which the first chunk has come."""
    stream = generation.stream(tiny.request(max_new_tokens=50_000))
    assert isinstance(await anext(stream), Chunk)
    return contextlib.aclosing(stream)


def script_engines(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let engines be a few lines that need no torch; `receive()` gives the next message, `send()` answers."""
    head = "import json, sys, time\nreceive = lambda: json.loads(sys.stdin.readline())\n"
    answer = "send = lambda **message: print(json.dumps(message), flush=True)\nreceive()\n"
    monkeypatch.setattr("service.generation.engine_process._ARGUMENTS", ("-c", head + answer + script))


ANSWERING = """
send(type="ready")
for line in sys.stdin:
    at = time.monotonic()
    of_request = {"id": json.loads(line)["id"]}
    send(type="begun", at=at, **of_request)
    send(type="done", prompt_tokens=1, completion_tokens=0, window_slid=False, numerics="", first_token_at=at,
         finished_at=at, n_cached=1, cache_bytes=1, **of_request)
"""
"""A scripted engine that answers each request, with nothing added."""
