"""Benchmark of generation through HTTP beside the engine alone: the cost of admission, processes, JSON and streams.

Both continue the same prompts, one after the other in every turn. The clients run in this process, with one connection
for each text; on a machine of few cores they take time from the engine, which the figure includes.
"""

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import torch

from nanomoe.bench import models
from nanomoe.config import SamplingConfig
from nanomoe.generation.engine import Engine, Request, useful_threads
from nanomoe.tokenizer import Tokenizer
from service.cli.bench.temporary_service import run_service
from service.client import Client

_PROMPT_TOKENS = 10
_NEW_TOKENS = 80
_LOOPS_SECONDS = 300.0
"""Longest time until the service has its compiled loops."""

_HEAD = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_SAMPLING = SamplingConfig(temperature=0.8, top_k=200)
"""The defaults of nanoGPT's `sample.py`."""


@dataclass(frozen=True)
class Served:
    """Speed for one number of concurrent texts."""

    model: str
    vocab_size: int
    at_once: int
    engine_tok_per_sec: float
    """Tokens a second of the engine alone, in this process."""

    http_tok_per_sec: float
    """Tokens a second through `POST /generate`, from the first request sent to the last response read."""

    ratio: float
    """HTTP over engine: median of the turns' ratios."""

    first_token_seconds: float
    """Seconds from a streaming request sent to its first chunk read: median over all texts."""


def measure(model_name: str, vocab_size: int, *, at_once: tuple[int, ...], turns: int) -> list[Served]:
    """Measure one of `models.MODELS` through a temporary service."""
    tokenizer = models.tokenizer_of(vocab_size)
    model = models.trained(model_name, tokenizer)
    engine = Engine(model.state_dict(), model.config, max_running=max(at_once), compiled=True)
    with run_service(engine_max_running=max(at_once)) as service:
        job_id = service.record(model, tokenizer)
        _until_loops(service.url, job_id)
        return [
            asyncio.run(_compare(service.url, job_id, engine, tokenizer, model_name, n, turns)) for n in at_once
        ]  # fmt: skip


def _until_loops(url: str, job_id: str) -> None:
    """Generate single tokens until the service uses compiled loops, as the engine in this process does.

    Raises:
        TimeoutError: the loops are not compiled within `_LOOPS_SECONDS`.
    """
    deadline = time.monotonic() + _LOOPS_SECONDS
    with Client(url) as client:
        job = client.job(job_id)
        while "compiled loops" not in job.generate("a", max_new_tokens=1).numerics:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no compiled loops after {_LOOPS_SECONDS:g} seconds; see the log of the service")
            time.sleep(0.2)


async def _compare(
    url: str, job_id: str, engine: Engine, tokenizer: Tokenizer, model_name: str, n: int, turns: int
) -> Served:
    bodies = _bodies(job_id, tokenizer, n)
    clients = [await _Client.connect(url) for _ in bodies]
    whole = [json.dumps(body).encode() for body in bodies]
    streamed = [json.dumps(body | {"stream": True}).encode() for body in bodies]

    async def send_all(requests: list[bytes]) -> list[float]:
        asked = zip(clients, requests, strict=True)
        return await asyncio.gather(*(client.send(request) for client, request in asked))

    await send_all(whole)  # the checkpoint is loaded
    _by_engine(engine, tokenizer, bodies)
    alone, served, first = [], [], []
    for _ in range(turns):
        alone.append(n * _NEW_TOKENS / _by_engine(engine, tokenizer, bodies))
        began = time.perf_counter()
        await send_all(whole)
        served.append(n * _NEW_TOKENS / (time.perf_counter() - began))
        first += await send_all(streamed)
    for client in clients:
        client.close()
    return Served(
        model=model_name,
        vocab_size=engine.vocab_size,
        at_once=n,
        engine_tok_per_sec=statistics.median(alone),
        http_tok_per_sec=statistics.median(served),
        ratio=statistics.median(http / engine for http, engine in zip(served, alone, strict=True)),
        first_token_seconds=statistics.median(first),
    )


class _Client:
    """A minimal HTTP client with a persistent connection: a client library's work for every request is as much as the
    service's, and would be measured with it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, url: str) -> Self:
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    async def send(self, body: bytes) -> float:
        """Send a request and read its response; returns the seconds to the first byte of the body."""
        began = time.perf_counter()
        self._writer.write(_HEAD % len(body) + body)
        status, *headers = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        assert b" 200 " in status, f"the service answered {status.decode()}"
        length = next((int(line.split(b":")[1]) for line in headers if line.startswith(b"content-length:")), None)
        if length is not None:
            await self._reader.readexactly(length)
            return time.perf_counter() - began
        first = None
        while size := int(await self._reader.readline(), 16):
            first = first or time.perf_counter() - began
            await self._reader.readexactly(size + 2)
        await self._reader.readline()
        assert first is not None, "an answer has a body"
        return first

    def close(self) -> None:
        self._writer.close()


def _bodies(job_id: str, tokenizer: Tokenizer, n: int) -> list[dict[str, object]]:
    """`n` requests with prompts of ten tokens, taken from the bundled paragraph."""
    tokens = tokenizer.encode(models.paragraph())
    starts = [seed % (len(tokens) - _PROMPT_TOKENS) for seed in range(n)]
    return [
        {
            "job_id": job_id,
            "prompt": tokenizer.decode(tokens[start : start + _PROMPT_TOKENS]),
            "max_new_tokens": _NEW_TOKENS,
            "temperature": _SAMPLING.temperature,
            "top_k": _SAMPLING.top_k,
            "seed": seed,
        }
        for seed, start in enumerate(starts)
    ]


def _by_engine(engine: Engine, tokenizer: Tokenizer, bodies: list[dict[str, object]]) -> float:
    """Seconds that the engine alone takes for these requests."""
    began = time.perf_counter()
    requests = [
        Request(tokenizer.encode(str(body["prompt"])), _NEW_TOKENS, _SAMPLING, seed) for seed, body in enumerate(bodies)
    ]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(useful_threads(len(requests), n_threads))
    try:
        made = engine.run(requests)
    finally:
        torch.set_num_threads(n_threads)
    for continuation in made:
        tokenizer.decode(continuation.new)
    return time.perf_counter() - began
