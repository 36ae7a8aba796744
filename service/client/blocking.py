"""The client for ordinary programs and notebooks: each method waits for its answer. `asynchronous.py` is its twin."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, overload

import httpx

from service.client import calls
from service.client.calls import Call, Which, method_signature
from service.client.connection import DEFAULT_URL, URL_VARIABLE, connection_settings
from service.client.continuation import ContinuationReader, Piece
from service.client.download import Download, file_names, make_folder, recorded_file
from service.client.errors import ClientError
from service.client.events import EventCursor, JobEvent
from service.client.job_fields import JobFields
from service.client.patience import STREAM_RETRIES, Patience
from service.http import schemas

P = ParamSpec("P")
T = TypeVar("T")


def _of_service(build: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    """The method of a client that makes this call."""

    @functools.wraps(build)
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client.ask(build(*args, **kwargs))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _gives_job(
    build: Callable[P, Call[schemas.JobView]],
) -> Callable[Concatenate["Client", P], "JobHandle"]:
    """The method of a client that makes this call and hands out the job it answers."""

    @functools.wraps(build)
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "JobHandle":
        return JobHandle(client, client.ask(build(*args, **kwargs)))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _of_job(build: Callable[Concatenate[str, P], Call[T]]) -> Callable[Concatenate["JobHandle", P], T]:
    """The method of a job that makes this call about it."""

    @functools.wraps(build)
    def method(job: "JobHandle", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer = job.client.ask(build(job.id, *args, **kwargs))
        if isinstance(answer, schemas.JobView):
            job.view = answer
        return answer

    return method


class Client:
    """A connection to the service. Raises the classes of `service.client.errors`.

    `base_url` is the service's address; None is that of the environment variable NANOMOE_URL, or else
    http://127.0.0.1:8000. `key` is sent as `Authorization: Bearer`; `timeout` is the seconds without a byte after which
    an ordinary request has failed; `retries` is how often one is sent again where that is safe.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        key: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        base_url = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        self.base_url = base_url.rstrip("/")
        self.retries = retries
        self._http = httpx.Client(**connection_settings(base_url, key, timeout, transport))

    estimate = _of_service(calls.estimate)
    list_jobs = _of_service(calls.list_jobs)
    workers = _of_service(calls.workers)
    health = _of_service(calls.health)
    readiness = _of_service(calls.readiness)

    submit = _gives_job(calls.submit)
    job = _gives_job(calls.get_job)

    def jobs(self, *, status: str | None = None, tag: str | None = None) -> "Iterator[JobHandle]":
        """All jobs, newest first, fetched page by page as they are asked for."""
        cursor = None
        while True:
            page = self.list_jobs(status=status, tag=tag, cursor=cursor)
            for view in page.data:
                yield JobHandle(self, view)
            cursor = page.next_cursor
            if cursor is None:
                return

    def ask(self, call: Call[T]) -> T:
        """Send a call, again where that is safe and helps, and read its answer."""
        patience = Patience(call.repeatable, self.retries)
        while True:
            try:
                return call.answer(self._http.send(call.request(self._http)))
            except (httpx.TransportError, ClientError) as failure:
                time.sleep(patience.pause_after(failure))

    @contextmanager
    def open(self, call: Call[bytes]) -> Iterator[httpx.Response]:
        """Send a call whose answer is read as it comes."""
        response = self._http.send(call.request(self._http), stream=True)
        try:
            if response.is_error:
                response.read()
            calls.check(response)
            yield response
        finally:
            response.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JobHandle(JobFields):
    """A job at the service."""

    def __init__(self, client: Client, view: schemas.JobView) -> None:
        self.client = client
        self.view = view

    refresh = _of_job(calls.get_job)
    update = _of_job(calls.update)
    text = _of_job(calls.text)
    cancel = _of_job(calls.cancel)
    pause = _of_job(calls.pause)
    resume = _of_job(calls.resume)
    delete = _of_job(calls.delete)
    metrics = _of_job(calls.metrics)
    metrics_csv = _of_job(calls.metrics_csv)
    checkpoints = _of_job(calls.checkpoints)
    checkpoint = _of_job(calls.checkpoint)
    reconstruction = _of_job(calls.reconstruction)
    score = _of_job(calls.score)
    inspect = _of_job(calls.inspect)

    @overload
    def generate(
        self, prompt: str, checkpoint: Which = "latest", *, stream: Literal[False] = False, **sampling: Any
    ) -> schemas.GenerateResponse: ...

    @overload
    def generate(
        self, prompt: str, checkpoint: Which = "latest", *, stream: Literal[True], **sampling: Any
    ) -> Iterator[Piece]: ...

    def generate(
        self, prompt: str, checkpoint: Which = "latest", *, stream: bool = False, **sampling: Any
    ) -> schemas.GenerateResponse | Iterator[Piece]:
        """Continue `prompt` from a checkpoint; `sampling` are the other fields of `GenerateRequest`.

        With `stream`, chunks as they are generated, and at last a `GenerateEnd`.
        """
        if stream:
            return self._stream(calls.generate_stream(self.id, prompt, checkpoint, **sampling))
        return self.client.ask(calls.generate(self.id, prompt, checkpoint, **sampling))

    def _stream(self, call: Call[bytes]) -> Iterator[Piece]:
        patience = Patience(call.repeatable, self.client.retries)
        while True:
            reader = ContinuationReader()
            try:
                with self.client.open(call) as response:
                    for chunk in response.iter_bytes():
                        yield from reader.feed(chunk)
                    reader.finish(response)
                    return
            except (httpx.TransportError, ClientError) as failure:
                time.sleep(patience.pause_after(failure, may_repeat=not reader.begun))

    def wait(self, on_event: Callable[[JobEvent], None] | None = None) -> schemas.JobView:
        """Follow the job to its end, through pauses too, and return it; `on_event` is called with each event.

        A broken connection is taken up again where it broke, for about a minute; then `Unreachable` is raised.
        """
        for event in self.events():
            if on_event is not None:
                on_event(event)
        return self.refresh()

    def events(self, last_event_id: str | None = None) -> Iterator[JobEvent]:
        """Each event from the first, or after `last_event_id`, until the job has ended."""
        cursor = EventCursor(self.id, last_event_id)
        patience = Patience(True, STREAM_RETRIES)
        while not cursor.ended:
            try:
                with self.client.open(cursor.call()) as response:
                    cursor.opened(response)
                    for chunk in response.iter_bytes():
                        patience = Patience(True, STREAM_RETRIES)
                        yield from cursor.feed(chunk)
                    cursor.closed(response)
            except (httpx.TransportError, ClientError) as failure:
                time.sleep(patience.pause_after(failure))

    def download(self, which: Which, name: str, to: str | Path) -> Path:
        """Write a file of a checkpoint to `to`, a folder or a new file's path, its size and sha256 checked."""
        return self._download(self.checkpoint(which), name, Path(to))

    def download_checkpoint(self, which: Which, to: str | Path) -> list[Path]:
        """Write all files of a checkpoint into the folder `to`, which is made if it is missing."""
        folder = make_folder(to)
        checkpoint = self.checkpoint(which)
        return [self._download(checkpoint, name, folder) for name in file_names(checkpoint)]

    def _download(self, checkpoint: schemas.CheckpointView, name: str, to: Path) -> Path:
        call = calls.download(self.id, checkpoint.percent, name)
        patience = Patience(call.repeatable, STREAM_RETRIES)
        while True:
            try:
                with self.client.open(call) as response, Download(name, to, recorded_file(checkpoint, name)) as file:
                    for chunk in response.iter_bytes():
                        file.feed(chunk)
                    return file.finish()
            except (httpx.TransportError, ClientError) as failure:
                time.sleep(patience.pause_after(failure))

    def __repr__(self) -> str:
        return f"<JobHandle {self.id} {self.view.status}>"
