"""The client for programs with an event loop: `blocking.py`, awaited. Both share the code of requests and responses."""

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, overload

import httpx

from service.client import calls
from service.client.calls import Call, CheckpointSelector, Target, method_signature
from service.client.comparison import Comparison
from service.client.connection import DEFAULT_URL, URL_VARIABLE, connection_settings
from service.client.continuation import ContinuationReader, Piece
from service.client.download import Download, file_names, make_folder, recorded_file
from service.client.errors import ClientError
from service.client.events import AllEventsCursor, EventCursor, JobEvent, SweepEventCursor
from service.client.job_fields import JobFields, SweepFields
from service.client.retry_policy import STREAM_RETRIES, RetryPolicy
from service.http import schemas

P = ParamSpec("P")
T = TypeVar("T")


def _client_method(build: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """The method of a client that makes this call."""

    @functools.wraps(build)
    async def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client.send(build(*args, **kwargs))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _returning_handle(
    build: Callable[P, Call[schemas.JobView]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, "AsyncJobHandle"]]:
    """The method of a client that makes this call and returns a handle of the job in its response."""

    @functools.wraps(build)
    async def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> "AsyncJobHandle":
        return AsyncJobHandle(client, await client.send(build(*args, **kwargs)))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _returning_sweep(
    build: Callable[P, Call[schemas.SweepView]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, "AsyncSweepHandle"]]:
    """The method of a client that makes this call and returns a handle of the sweep in its response."""

    @functools.wraps(build)
    async def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> "AsyncSweepHandle":
        return AsyncSweepHandle(client, await client.send(build(*args, **kwargs)))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _sweep_method(
    build: Callable[Concatenate[str, P], Call[T]],
) -> Callable[Concatenate["AsyncSweepHandle", P], Coroutine[Any, Any, T]]:
    """The method of a sweep that makes this call about it."""

    @functools.wraps(build)
    async def method(sweep: "AsyncSweepHandle", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer = await sweep.client.send(build(sweep.id, *args, **kwargs))
        if isinstance(answer, schemas.SweepView):
            sweep.view = answer
        return answer

    return method


def _job_method(
    build: Callable[Concatenate[str, P], Call[T]],
) -> Callable[Concatenate["AsyncJobHandle", P], Coroutine[Any, Any, T]]:
    """The method of a job that makes this call about it."""

    @functools.wraps(build)
    async def method(job: "AsyncJobHandle", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer = await job.client.send(build(job.id, *args, **kwargs))
        if isinstance(answer, schemas.JobView):
            job.view = answer
        return answer

    return method


class AsyncClient:
    """`Client` for an event loop."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        key: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        base_url = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        self.base_url = base_url.rstrip("/")
        self.retries = retries
        self._http = httpx.AsyncClient(**connection_settings(base_url, key, timeout, transport))

    estimate = _client_method(calls.estimate)
    list_jobs = _client_method(calls.list_jobs)
    workers = _client_method(calls.workers)
    health = _client_method(calls.health)
    estimate_sweep = _client_method(calls.estimate_sweep)
    list_sweeps = _client_method(calls.list_sweeps)
    compare = _client_method(calls.compare)
    compare_csv = _client_method(calls.compare_csv)
    compare_html = _client_method(calls.compare_html)
    compare_series = _client_method(calls.compare_series)
    presets = _client_method(calls.presets)
    readiness = _client_method(calls.readiness)
    session = _client_method(calls.session)

    submit = _returning_handle(calls.submit)
    import_model = _returning_handle(calls.import_model)
    job = _returning_handle(calls.get_job)
    sweep = _returning_sweep(calls.sweep)
    get_sweep = _returning_sweep(calls.get_sweep)

    async def jobs(self, *, status: str | None = None, tag: str | None = None) -> "AsyncIterator[AsyncJobHandle]":
        """All jobs, newest first, fetched page by page as they are asked for."""
        cursor = None
        while True:
            page = await self.list_jobs(status=status, tag=tag, cursor=cursor)
            for view in page.data:
                yield AsyncJobHandle(self, view)
            cursor = page.next_cursor
            if cursor is None:
                return

    def events(
        self, *, sweep: str | None = None, tag: str | None = None, last_event_id: str | None = None
    ) -> AsyncIterator[JobEvent]:
        """Each event of all jobs, of those of a sweep, or of those with a tag (`key` or `key=value`), from now on or
        after `last_event_id`. Does not end by itself; a broken connection is resumed where it broke."""
        return _follow(self, AllEventsCursor(sweep, tag, last_event_id))

    @overload
    def generate(
        self, targets: Sequence[Target], prompt: str, *, stream: Literal[False] = False, **sampling: Any
    ) -> Coroutine[Any, Any, schemas.GenerateTargetsResponse]: ...

    @overload
    def generate(
        self, targets: Sequence[Target], prompt: str, *, stream: Literal[True], **sampling: Any
    ) -> AsyncIterator[Piece]: ...

    def generate(
        self, targets: Sequence[Target], prompt: str, *, stream: bool = False, **sampling: Any
    ) -> Coroutine[Any, Any, schemas.GenerateTargetsResponse] | AsyncIterator[Piece]:
        """`Client.generate`: awaited, or with `stream` iterated over."""
        if stream:
            return self.continuation(calls.generate_targets_stream(targets, prompt, **sampling))
        return self.send(calls.generate_targets(targets, prompt, **sampling))

    async def plot(
        self, *jobs: str, sweep: str | None = None, tag: str | None = None, metrics: Sequence[str] | None = None
    ) -> Comparison:
        """`Client.plot`, awaited."""
        found = await self.compare(*jobs, sweep=sweep, tag=tag, metrics=metrics)
        series = await self.compare_series(*jobs, sweep=sweep, tag=tag)
        found.read_series = lambda: series
        return found

    async def run(self, name: str, on_event: Callable[[JobEvent], Awaitable[None] | None] | None = None) -> Comparison:
        """`Client.run`, awaited."""
        call, metrics = calls.run_preset(await self.presets(), name)
        sweep = AsyncSweepHandle(self, await self.send(call))
        await sweep.wait(on_event)
        return await sweep.plot(metrics)

    async def send(self, call: Call[T]) -> T:
        """Send a call, with retries where that is safe and useful, and return its result."""
        retry_policy = RetryPolicy(call.repeatable, self.retries)
        while True:
            try:
                with call.opened() as files:
                    return call.answer(await self._http.send(call.request(self._http, files)))
            except (httpx.TransportError, ClientError) as failure:
                await asyncio.sleep(retry_policy.delay_after(failure))

    @asynccontextmanager
    async def open(self, call: Call[bytes]) -> AsyncIterator[httpx.Response]:
        """Send a call whose response is streamed."""
        response = await self._http.send(call.request(self._http), stream=True, follow_redirects=call.redirects)
        try:
            if response.is_error:
                await response.aread()
            calls.check(response)
            yield response
        finally:
            await response.aclose()

    async def continuation(self, call: Call[bytes]) -> AsyncIterator[Piece]:
        """Send a generation whose answer is streamed, and yield its chunks; repeated while none has come."""
        retry_policy = RetryPolicy(call.repeatable, self.retries)
        while True:
            reader = ContinuationReader()
            try:
                async with self.open(call) as response:
                    async for chunk in response.aiter_bytes():
                        for piece in reader.feed(chunk):
                            yield piece
                    reader.finish(response)
                    return
            except (httpx.TransportError, ClientError) as failure:
                await asyncio.sleep(retry_policy.delay_after(failure, may_repeat=not reader.begun))

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncJobHandle(JobFields):
    """`JobHandle` for an event loop."""

    def __init__(self, client: AsyncClient, view: schemas.JobView) -> None:
        self.client = client
        self.view = view

    refresh = _job_method(calls.get_job)
    update = _job_method(calls.update)
    text = _job_method(calls.text)
    cancel = _job_method(calls.cancel)
    pause = _job_method(calls.pause)
    resume = _job_method(calls.resume)
    delete = _job_method(calls.delete)
    metrics = _job_method(calls.metrics)
    metrics_csv = _job_method(calls.metrics_csv)
    checkpoints = _job_method(calls.checkpoints)
    checkpoint = _job_method(calls.checkpoint)
    reconstruction = _job_method(calls.reconstruction)
    score = _job_method(calls.score)
    inspect = _job_method(calls.inspect)

    @overload
    def generate(
        self, prompt: str, checkpoint: CheckpointSelector = "latest", *, stream: Literal[False] = False, **sampling: Any
    ) -> Coroutine[Any, Any, schemas.GenerateResponse]: ...

    @overload
    def generate(
        self, prompt: str, checkpoint: CheckpointSelector = "latest", *, stream: Literal[True], **sampling: Any
    ) -> AsyncIterator[Piece]: ...

    def generate(
        self, prompt: str, checkpoint: CheckpointSelector = "latest", *, stream: bool = False, **sampling: Any
    ) -> Coroutine[Any, Any, schemas.GenerateResponse] | AsyncIterator[Piece]:
        """`JobHandle.generate`: awaited, or with `stream` iterated over."""
        if stream:
            return self.client.continuation(calls.generate_stream(self.id, prompt, checkpoint, **sampling))
        return self.client.send(calls.generate(self.id, prompt, checkpoint, **sampling))

    async def wait(self, on_event: Callable[[JobEvent], Awaitable[None] | None] | None = None) -> schemas.JobView:
        """`JobHandle.wait`; an `on_event` that returns an awaitable is awaited."""
        await _each(self.events(), on_event)
        return await self.refresh()

    def events(self, last_event_id: str | None = None) -> AsyncIterator[JobEvent]:
        """Each event from the first, or after `last_event_id`, until the job has ended."""
        return _follow(self.client, EventCursor(self.id, last_event_id))

    async def download(self, which: CheckpointSelector, name: str, to: str | Path) -> Path:
        """Write a file of a checkpoint to `to`, a folder or a new file's path, its size and sha256 checked."""
        return await self._download(await self.checkpoint(which), name, Path(to))

    async def download_checkpoint(self, which: CheckpointSelector, to: str | Path) -> list[Path]:
        """Write all files of a checkpoint into the folder `to`, which is made if it is missing."""
        folder = make_folder(to)
        checkpoint = await self.checkpoint(which)
        return [await self._download(checkpoint, name, folder) for name in file_names(checkpoint)]

    async def _download(self, checkpoint: schemas.CheckpointView, name: str, to: Path) -> Path:
        call = calls.download(self.id, checkpoint.percent, name)
        retry_policy = RetryPolicy(call.repeatable, STREAM_RETRIES)
        while True:
            try:
                async with self.client.open(call) as response:
                    with Download(name, to, recorded_file(checkpoint, name)) as file:
                        async for chunk in response.aiter_bytes():
                            file.feed(chunk)
                        return file.finish()
            except (httpx.TransportError, ClientError) as failure:
                await asyncio.sleep(retry_policy.delay_after(failure))

    def __repr__(self) -> str:
        return f"<AsyncJobHandle {self.id} {self.view.status}>"


class AsyncSweepHandle(SweepFields):
    """`SweepHandle` for an event loop."""

    def __init__(self, client: AsyncClient, view: schemas.SweepView) -> None:
        self.client = client
        self.view = view

    refresh = _sweep_method(calls.get_sweep)
    cancel = _sweep_method(calls.cancel_sweep)
    pause = _sweep_method(calls.pause_sweep)
    resume = _sweep_method(calls.resume_sweep)
    delete = _sweep_method(calls.delete_sweep)

    async def jobs(self) -> AsyncIterator[AsyncJobHandle]:
        """Its jobs in the order of submission, each fetched as it is asked for."""
        for job_id in self.view.job_ids or (await self.refresh()).job_ids or ():
            yield await self.client.job(job_id)

    async def generate(
        self, prompt: str, checkpoint: CheckpointSelector = "latest", **sampling: Any
    ) -> schemas.GenerateTargetsResponse:
        """`SweepHandle.generate`, awaited."""
        job_ids = self.view.job_ids or (await self.refresh()).job_ids or ()
        targets = [(job_id, checkpoint) for job_id in job_ids]
        return await self.client.send(calls.generate_targets(targets, prompt, **sampling))

    async def compare(
        self,
        metrics: Sequence[str] | None = None,
        *,
        perplexity: float | None = None,
        best: str | None = None,
        at_step: int | None = None,
    ) -> Comparison:
        """`SweepHandle.compare`, awaited."""
        return await self.client.compare(
            sweep=self.id, metrics=metrics, perplexity=perplexity, best=best, at_step=at_step
        )

    async def series(self, points: int | None = None) -> list[schemas.JobEnvelope]:
        """`SweepHandle.series`, awaited."""
        return await self.client.compare_series(sweep=self.id, points=points)

    async def plot(self, metrics: Sequence[str] | None = None) -> Comparison:
        """`SweepHandle.plot`, awaited."""
        return await self.client.plot(sweep=self.id, metrics=metrics)

    async def wait(self, on_event: Callable[[JobEvent], Awaitable[None] | None] | None = None) -> schemas.SweepView:
        """`SweepHandle.wait`; an `on_event` that returns an awaitable is awaited."""
        await _each(self.events(), on_event)
        return await self.refresh()

    def events(self, last_event_id: str | None = None) -> AsyncIterator[JobEvent]:
        """Each event of any of its jobs from the first, or after `last_event_id`, until all have ended."""
        return _follow(self.client, SweepEventCursor(self.id, last_event_id))

    def __repr__(self) -> str:
        return f"<AsyncSweepHandle {self.id} {self.view.status}>"


async def _each(events: AsyncIterator[JobEvent], on_event: Callable[[JobEvent], Awaitable[None] | None] | None) -> None:
    async for event in events:
        if on_event is not None and (reaction := on_event(event)) is not None:
            await reaction


async def _follow(client: AsyncClient, cursor: EventCursor) -> AsyncIterator[JobEvent]:
    """The events of a stream to its end; a broken connection is resumed where it broke."""
    retry_policy = RetryPolicy(True, STREAM_RETRIES)
    while not cursor.ended:
        try:
            async with client.open(cursor.call()) as response:
                cursor.opened(response)
                async for chunk in response.aiter_bytes():
                    retry_policy = RetryPolicy(True, STREAM_RETRIES)
                    for event in cursor.feed(chunk):
                        yield event
                cursor.closed(response)
        except (httpx.TransportError, ClientError) as failure:
            await asyncio.sleep(retry_policy.delay_after(failure))
