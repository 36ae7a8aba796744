"""Generation through HTTP, beside the engine alone: what admission, processes, JSON and streams cost.

Both continue the same prompts, one after the other in every turn. The clients are one process with one connection for
each text; on a machine of few cores they take time from the engine, which is part of the figure.
"""

import asyncio
import statistics
import time
from dataclasses import dataclass

import httpx
import torch

from nanomoe.bench import models
from nanomoe.bench.generation import TEMPERATURE, TOP_K
from nanomoe.generate import Engine, Request, useful_threads
from nanomoe.sampling import Sampling
from nanomoe.tokenizer import Tokenizer
from service.cli.bench.site import open_site

_PROMPT_TOKENS = 10
_NEW_TOKENS = 80


@dataclass(frozen=True)
class Served:
    """Tokens a second of one number of texts at once."""

    model: str
    vocab_size: int
    at_once: int
    engine_tok_per_sec: float
    """Of the engine alone, in this process."""

    http_tok_per_sec: float
    """Through `POST /generate`, from the first request sent to the last answer read."""

    ratio: float
    """http over engine: the median of the turns' ratios."""

    first_token_seconds: float
    """From a streaming request sent to its first chunk read, the median over all texts."""


def measure(model_name: str, vocab_size: int, *, at_once: tuple[int, ...], turns: int) -> list[Served]:
    """Measure one of `models.MODELS` through a service of its own."""
    tokenizer = models.tokenizer_of(vocab_size)
    model = models.trained(model_name, tokenizer)
    engine = Engine(model.state_dict(), model.config, max_running=max(at_once), compiled=True)
    with open_site(engine_max_running=max(at_once)) as site:
        job_id = site.record(model, tokenizer)
        return [
            asyncio.run(_compare(site.url, job_id, engine, tokenizer, model_name, n, turns)) for n in at_once
        ]  # fmt: skip


async def _compare(
    url: str, job_id: str, engine: Engine, tokenizer: Tokenizer, model_name: str, n: int, turns: int
) -> Served:
    limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        bodies = _bodies(job_id, tokenizer, n)
        await asyncio.gather(*(_ask(client, body) for body in bodies))  # the checkpoint is loaded, connections are open
        _by_engine(engine, tokenizer, bodies)
        alone, served = [], []
        for _ in range(turns):
            alone.append(n * _NEW_TOKENS / _by_engine(engine, tokenizer, bodies))
            began = time.perf_counter()
            await asyncio.gather(*(_ask(client, body) for body in bodies))
            served.append(n * _NEW_TOKENS / (time.perf_counter() - began))
        first: list[float] = []
        for _ in range(turns):
            first += await asyncio.gather(*(_first(client, body) for body in bodies))
    return Served(
        model=model_name,
        vocab_size=engine.vocab_size,
        at_once=n,
        engine_tok_per_sec=statistics.median(alone),
        http_tok_per_sec=statistics.median(served),
        ratio=statistics.median(http / engine for http, engine in zip(served, alone, strict=True)),
        first_token_seconds=statistics.median(first),
    )


def _bodies(job_id: str, tokenizer: Tokenizer, n: int) -> list[dict[str, object]]:
    """`n` requests with prompts of ten tokens, taken from the bundled paragraph."""
    tokens = tokenizer.encode(models.paragraph())
    starts = [seed % (len(tokens) - _PROMPT_TOKENS) for seed in range(n)]
    return [
        {
            "job_id": job_id,
            "prompt": tokenizer.decode(tokens[start : start + _PROMPT_TOKENS]),
            "max_new_tokens": _NEW_TOKENS,
            "temperature": TEMPERATURE,
            "top_k": TOP_K,
            "seed": seed,
        }
        for seed, start in enumerate(starts)
    ]


def _by_engine(engine: Engine, tokenizer: Tokenizer, bodies: list[dict[str, object]]) -> float:
    """Seconds that the engine alone takes for these requests."""
    began = time.perf_counter()
    requests = [
        Request(tokenizer.encode(str(body["prompt"])), _NEW_TOKENS, Sampling(TEMPERATURE, TOP_K), seed)
        for seed, body in enumerate(bodies)
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


async def _ask(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    answer = (await client.post("/generate", json=body)).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == _NEW_TOKENS


async def _first(client: httpx.AsyncClient, body: dict[str, object]) -> float:
    """Seconds to the first chunk of a stream; the rest is read too."""
    began = time.perf_counter()
    first = 0.0
    async with client.stream("POST", "/generate", json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data:") and not first:
                first = time.perf_counter() - began
    return first
