"""A crowd: many clients generate at once, leave in the middle, and send what is no request.

    python -m tests.faults.crowd --clients 128 --rounds 3 --seconds 60

No answer but those that were provoked, no slot kept by a client that left, no memory that grows from round to round.
Beside the crowd another process looks at a job, as a browser would, and a worker trains a sweep in company, none of
whose jobs stops or loses its worker meanwhile. The suite does a short run of it.
"""

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from nanomoe.bench.models import MODELS, untrained
from nanomoe.tokenizer import BUNDLED, load_tokenizer
from service.cli.bench.temporary_service import TemporaryService, run_service
from service.client import Client, SweepHandle
from tests.faults.polling_client import poll

PROMPTS = ("Era uma vez", "A chuva caiu a noite toda", "O gato", "De manhã o quintal era um lago de barro, e o menino")
TRAINED: dict[str, Any] = {
    "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "epochs": 1_000_000,
}  # fmt: skip
"""Config of the jobs that are trained beside: small, and without an end."""
MAX_RUNNING = 64
MAX_WAITING = 32

BAD: list[tuple[dict[str, Any], tuple[int, str]]] = [
    ({"prompt": ""}, (422, "empty_prompt")),
    ({"max_new_tokens": 10**4}, (422, "max_new_tokens_too_large")),
    ({"n": MAX_RUNNING + 1}, (422, "n_too_large")),
    ({"job_id": "0" * 32}, (404, "job_not_found")),
    ({"checkpoint": 25}, (404, "checkpoint_not_found")),
    ({"temperature": -1}, (422, "invalid_request")),
    ({"colour": "red"}, (422, "invalid_request")),
]
"""What is wrong with a request, and the answer that it must get."""


@dataclass
class Round:
    """What the clients saw between two looks at the memory."""

    answers: Counter[str] = field(default_factory=Counter)
    """By kind; those that nobody provoked are `unexpected ...`."""
    first_token: list[float] = field(default_factory=list)
    """Seconds from the request to the first chunk of its stream."""
    total: list[float] = field(default_factory=list)
    """Seconds from the request to the end of its answer."""
    looks: list[float] = field(default_factory=list)
    """Seconds of each `GET /jobs/{id}`."""
    tokens: int = 0
    steps_trained: int = 0
    """Steps of the jobs that were trained beside."""
    resident: dict[str, int] = field(default_factory=dict)
    """Bytes of each process afterwards."""

    @property
    def unexpected(self) -> dict[str, int]:
        """Answers that were not provoked."""
        return {answer: count for answer, count in self.answers.items() if answer.startswith("unexpected")}

    def figures(self) -> dict[str, Any]:
        """The round as JSON, times in milliseconds."""
        seconds = {"first_token": self.first_token, "total": self.total, "get_job": self.looks}
        return {
            "answers": dict(self.answers),
            "tokens": self.tokens,
            "steps_trained": self.steps_trained,
            "resident_mib": {name: round(size / 2**20, 1) for name, size in self.resident.items()},
            **{f"{name}_ms": {f"p{share}": _percentile(taken, share) for share in (50, 99)}
               for name, taken in seconds.items() if taken},
        }  # fmt: skip


class Crowd:
    """Clients of one service."""

    def __init__(
        self, site: TemporaryService, job_id: str, n_clients: int, seed: int, training: SweepHandle | None = None
    ) -> None:
        """`training`: a sweep that is trained beside."""
        self.site, self.job_id, self.n_clients, self.training = site, job_id, n_clients, training
        self.chance = random.Random(seed)  # noqa: S311 - the same crowd every time

    def round(self, seconds: float) -> Round:
        """Let the clients loose for a while, then wait until all have their answers."""
        seen = Round()
        before = self._steps(seen)
        context = multiprocessing.get_context("spawn")
        over = context.Event()
        looking = context.Queue()
        watcher = context.Process(target=poll, args=(self.site.url, self.job_id, over, looking))
        watcher.start()
        looking.get(timeout=60)  # it has begun
        asyncio.run(self._everybody(seen, seconds))
        over.set()
        seen.looks = looking.get(timeout=60)
        watcher.join()
        self._settle()
        seen.steps_trained = self._steps(seen) - before
        seen.resident = self._resident()
        return seen

    def _steps(self, seen: Round) -> int:
        """Steps that the jobs beside have done so far, all of which must run in their first attempt."""
        if self.training is None:
            return 0
        view = self.training.refresh()
        for job in self.training.jobs():
            if (job.status, job.view.attempt) != ("running", 1):
                seen.answers[f"unexpected {job.status} job in attempt {job.view.attempt}"] += 1
        return 0 if view.progress is None else view.progress.step

    async def _everybody(self, seen: Round, seconds: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.n_clients)
        async with httpx.AsyncClient(base_url=self.site.url, timeout=120, limits=limits) as http:
            until = time.monotonic() + seconds
            clients = [self._one(http, seen, until, random.Random(self.chance.random())) for _ in range(self.n_clients)]  # noqa: S311
            await asyncio.gather(*clients)

    async def _one(self, http: httpx.AsyncClient, seen: Round, until: float, chance: random.Random) -> None:
        while time.monotonic() < until:
            body = {
                "job_id": self.job_id,
                "prompt": chance.choice(PROMPTS),
                "max_new_tokens": chance.randrange(1, 120),  # beyond block_size too
                "temperature": chance.choice([0, 0.8, 1.0]),
                "top_k": chance.choice([None, 1, 40]),
                "n": chance.choice([1, 1, 1, 3]),
            }
            what = chance.random()
            if what < 0.1:
                await _bad(http, seen, body, chance)
            elif what < 0.25:
                await _leave(http, seen, body, chance)
            elif what < 0.6:
                await _stream(http, seen, body)
            else:
                await _plain(http, seen, body)

    def _settle(self) -> None:
        """Every slot is free: a request for all of them at once begins, and ends."""
        body = {"job_id": self.job_id, "prompt": "O gato", "max_new_tokens": 2, "n": MAX_RUNNING}
        answer = httpx.post(f"{self.site.url}/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        gauges = httpx.get(f"{self.site.url}/metrics").text.splitlines()
        assert "nanomoe_generation_running 0.0" in gauges
        assert "nanomoe_generation_waiting 0.0" in gauges

    def _resident(self) -> dict[str, int]:
        """Bytes of the API and of its engine."""
        (api,) = (
            child for child in psutil.Process().children() if child.cmdline()[-2:] == ["-m", "service"]
        )  # fmt: skip
        (engine,) = api.children()
        return {"api": api.memory_info().rss, "engine": engine.memory_info().rss}


async def _plain(http: httpx.AsyncClient, seen: Round, body: dict[str, Any]) -> None:
    began = time.perf_counter()
    answer = await http.post("/generate", json=body)
    if answer.status_code == 200:
        seen.answers["answered"] += 1
        seen.total.append(time.perf_counter() - began)
        seen.tokens += answer.json()["usage"]["completion_tokens"]
    else:
        _refused(seen, answer)
        await asyncio.sleep(float(answer.headers.get("retry-after", 1)))


async def _stream(http: httpx.AsyncClient, seen: Round, body: dict[str, Any]) -> None:
    began = time.perf_counter()
    first, finished = None, False
    async with http.stream("POST", "/generate", json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            _refused(seen, answer)
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                first = first or time.perf_counter() - began
                finished |= line == "data: [DONE]"
    if answer.status_code != 200:
        await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
    elif first is None or not finished:
        seen.answers["unexpected end of a stream"] += 1
    else:
        seen.answers["streamed"] += 1
        seen.first_token.append(first)
        seen.total.append(time.perf_counter() - began)


async def _leave(http: httpx.AsyncClient, seen: Round, body: dict[str, Any], chance: random.Random) -> None:
    """Close the connection in the middle: after a few chunks, or before any answer. Who is refused does not leave."""
    if chance.random() < 0.5:
        async with http.stream("POST", "/generate", json=body | {"stream": True, "max_new_tokens": 400}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                _refused(seen, answer)
                return
            left = chance.randrange(1, 5)
            async for _ in answer.aiter_lines():
                left -= 1
                if not left:
                    break
    else:
        with contextlib.suppress(httpx.TimeoutException):
            answer = await http.post(
                "/generate", json=body | {"max_new_tokens": 400}, timeout=chance.uniform(0.05, 0.5)
            )
            if answer.status_code != 200:
                _refused(seen, answer)
                return
    seen.answers["left"] += 1


async def _bad(http: httpx.AsyncClient, seen: Round, body: dict[str, Any], chance: random.Random) -> None:
    wrong, (status, code) = chance.choice(BAD)
    answer = await http.post("/generate", json=body | wrong)
    if answer.status_code == status and answer.json()["code"] == code:
        seen.answers["refused as it must be"] += 1
    else:
        _refused(seen, answer)


def _refused(seen: Round, answer: httpx.Response) -> None:
    """More clients than places: 429 is what is meant to happen, and says when to come back."""
    code = answer.json().get("code")
    if (answer.status_code, code) == (429, "generation_queue_full") and "retry-after" in answer.headers:
        seen.answers["told to come back"] += 1
    else:
        seen.answers[f"unexpected {answer.status_code} {code}"] += 1


def _percentile(values: list[float], share: int) -> float:
    return round(1e3 * sorted(values)[math.ceil(share / 100 * len(values)) - 1], 1)


def run(
    n_clients: int, rounds: int, seconds: float, seed: int = 0, model: str = "mixture", cohort: int = 4
) -> list[Round]:
    """So many rounds on a service of its own, beside a worker that trains `cohort` jobs together; 0 for none."""
    tokenizer = load_tokenizer(BUNDLED)
    weights = untrained(model, tokenizer.vocab_size)
    with run_service(engine_max_running=MAX_RUNNING, engine_max_waiting=MAX_WAITING, cohort=cohort or 1) as site:
        job_id = site.record(weights, tokenizer)
        with Client(site.url) as client:
            training = _train(site, client, cohort) if cohort else None
            crowd = Crowd(site, job_id, n_clients, seed, training)
            return [crowd.round(seconds) for _ in range(rounds)]


def _train(site: TemporaryService, client: Client, cohort: int) -> SweepHandle:
    """A sweep that is trained in company by now, and for long."""
    site.processes.start_worker()
    sweep = client.sweep(" ".join(PROMPTS), TRAINED, seeds=cohort)
    while True:
        jobs = list(sweep.jobs())
        if all(job.view.progress.step for job in jobs):
            assert {job.cohort and job.cohort.size for job in jobs} == {cohort}
            return sweep
        assert not any(job.is_terminal for job in jobs)
        time.sleep(0.2)


def main() -> None:
    """Run, and print each round as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=list(MODELS), default="mixture")
    parser.add_argument("--cohort", type=int, default=4, help="jobs that are trained together beside; 0 for none")
    options = parser.parse_args()
    for one in run(options.clients, options.rounds, options.seconds, options.seed, options.model, options.cohort):
        print(json.dumps(one.figures()))


if __name__ == "__main__":
    main()
