"""The client for ordinary programs and notebooks: each method blocks until its response. `asynchronous.py` is the same
for event loops."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from service.client.errors import NO_ANSWER, ClientError
from service.client.events import AllEventsCursor, EventCursor, JobEvent, SweepEventCursor
from service.client.job_fields import JobFields, SweepFields
from service.client.retry_policy import STREAM_RETRIES, RetryPolicy
from service.http import schemas
from service.report.job import job_html, sweep_line

P = ParamSpec("P")
T = TypeVar("T")

NOTEBOOK_POINTS = 400
"""Points of the curve that a notebook shows."""


def _client_method(build: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    """The method of a client that makes this call."""

    @functools.wraps(build)
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client.send(build(*args, **kwargs))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _returning_handle(
    build: Callable[P, Call[schemas.JobView]],
) -> Callable[Concatenate["Client", P], "JobHandle"]:
    """The method of a client that makes this call and returns a handle of the job in its response."""

    @functools.wraps(build)
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "JobHandle":
        return JobHandle(client, client.send(build(*args, **kwargs)))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _returning_sweep(
    build: Callable[P, Call[schemas.SweepView]],
) -> Callable[Concatenate["Client", P], "SweepHandle"]:
    """The method of a client that makes this call and returns a handle of the sweep in its response."""

    @functools.wraps(build)
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "SweepHandle":
        return SweepHandle(client, client.send(build(*args, **kwargs)))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _returning_comparison(
    build: Callable[P, Call[Comparison]],
) -> Callable[Concatenate["Client", P], Comparison]:
    """The method of a client that makes this call, and whose result asks for its curves when a notebook shows it."""

    @functools.wraps(build)
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Comparison:
        call = build(*args, **kwargs)
        found = client.send(call)
        found.read_series = functools.partial(client.send, calls.series_of(call))
        return found

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]
    return method


def _sweep_method(build: Callable[Concatenate[str, P], Call[T]]) -> Callable[Concatenate["SweepHandle", P], T]:
    """The method of a sweep that makes this call about it."""

    @functools.wraps(build)
    def method(sweep: "SweepHandle", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer = sweep.client.send(build(sweep.id, *args, **kwargs))
        if isinstance(answer, schemas.SweepView):
            sweep.view = answer
        return answer

    return method


def _job_method(build: Callable[Concatenate[str, P], Call[T]]) -> Callable[Concatenate["JobHandle", P], T]:
    """The method of a job that makes this call about it."""

    @functools.wraps(build)
    def method(job: "JobHandle", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer = job.client.send(build(job.id, *args, **kwargs))
        if isinstance(answer, schemas.JobView):
            job.view = answer
        return answer

    return method


class Client:
    """A connection to the service. Raises the classes of `service.client.errors`.

    `base_url` is the service's address; None is that of the environment variable NANOMOE_URL, or else
    http://127.0.0.1:8000. `key`, or else that of the environment variable NANOMOE_KEY, is sent as `Authorization:
    Bearer`; `timeout` is the seconds without a byte after which an ordinary request fails; `retries` is how often one
    is repeated where that is safe.
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

    estimate = _client_method(calls.estimate)
    list_jobs = _client_method(calls.list_jobs)
    workers = _client_method(calls.workers)
    health = _client_method(calls.health)
    estimate_sweep = _client_method(calls.estimate_sweep)
    list_sweeps = _client_method(calls.list_sweeps)
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

    compare = _returning_comparison(calls.compare)

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

    def events(
        self, *, sweep: str | None = None, tag: str | None = None, last_event_id: str | None = None
    ) -> Iterator[JobEvent]:
        """Each event of all jobs, of those of a sweep, or of those with a tag (`key` or `key=value`), from now on or
        after `last_event_id`. Does not end by itself; a broken connection is resumed where it broke."""
        return _follow(self, AllEventsCursor(sweep, tag, last_event_id))

    @overload
    def generate(
        self, targets: Sequence[Target], prompt: str, *, stream: Literal[False] = False, **sampling: Any
    ) -> schemas.GenerateTargetsResponse: ...

    @overload
    def generate(
        self, targets: Sequence[Target], prompt: str, *, stream: Literal[True], **sampling: Any
    ) -> Iterator[Piece]: ...

    def generate(
        self, targets: Sequence[Target], prompt: str, *, stream: bool = False, **sampling: Any
    ) -> schemas.GenerateTargetsResponse | Iterator[Piece]:
        """Continue `prompt` from several checkpoints with the same seed, side by side. Each is `"JOB@50"`, `"JOB"` for
        its newest, or a pair of job and percent; `sampling` are the other fields of `GenerateRequest`.

        With `stream`, an iterator of chunks as they are generated, each with the number of its target, and for each
        target a `GenerateEnd`.
        """
        if stream:
            return self.continuation(calls.generate_targets_stream(targets, prompt, **sampling))
        return self.send(calls.generate_targets(targets, prompt, **sampling))

    def plot(
        self, *jobs: str, sweep: str | None = None, tag: str | None = None, metrics: Sequence[str] | None = None
    ) -> Comparison:
        """`compare`, with the training curves read now: it shows and saves them without asking again."""
        found = self.compare(*jobs, sweep=sweep, tag=tag, metrics=metrics)
        series = self.compare_series(*jobs, sweep=sweep, tag=tag)
        found.read_series = lambda: series
        return found

    def run(self, name: str, on_event: Callable[[JobEvent], None] | None = None) -> Comparison:
        """Run a ready experiment to its end, and return the comparison with its curves; `presets` lists them.

        `on_event` is called with each event of its jobs. Raises ValueError for an unknown name.
        """
        call, metrics = calls.run_preset(self.presets(), name)
        sweep = SweepHandle(self, self.send(call))
        sweep.wait(on_event)
        return sweep.plot(metrics)

    def send(self, call: Call[T]) -> T:
        """Send a call, with retries where that is safe and useful, and return its result."""
        retry_policy = RetryPolicy(call.repeatable, self.retries)
        while True:
            try:
                with call.opened() as files:
                    return call.answer(self._http.send(call.request(self._http, files)))
            except (httpx.TransportError, ClientError) as failure:
                time.sleep(retry_policy.delay_after(failure))

    @contextmanager
    def open(self, call: Call[bytes]) -> Iterator[httpx.Response]:
        """Send a call whose response is streamed."""
        response = self._http.send(call.request(self._http), stream=True, follow_redirects=call.redirects)
        try:
            if response.is_error:
                response.read()
            calls.check(response)
            yield response
        finally:
            response.close()

    def continuation(self, call: Call[bytes]) -> Iterator[Piece]:
        """Send a generation whose answer is streamed, and yield its chunks; repeated while none has come."""
        retry_policy = RetryPolicy(call.repeatable, self.retries)
        while True:
            reader = ContinuationReader()
            try:
                with self.open(call) as response:
                    for chunk in response.iter_bytes():
                        yield from reader.feed(chunk)
                    reader.finish(response)
                    return
            except (httpx.TransportError, ClientError) as failure:
                time.sleep(retry_policy.delay_after(failure, may_repeat=not reader.begun))

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
    """A job of the service: its fields as last answered, and the requests about it."""

    def __init__(self, client: Client, view: schemas.JobView) -> None:
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
    ) -> schemas.GenerateResponse: ...

    @overload
    def generate(
        self, prompt: str, checkpoint: CheckpointSelector = "latest", *, stream: Literal[True], **sampling: Any
    ) -> Iterator[Piece]: ...

    def generate(
        self, prompt: str, checkpoint: CheckpointSelector = "latest", *, stream: bool = False, **sampling: Any
    ) -> schemas.GenerateResponse | Iterator[Piece]:
        """Continue `prompt` from a checkpoint; `sampling` are the other fields of `GenerateRequest`.

        With `stream`, an iterator of chunks as they are generated, and at the end a `GenerateEnd`.
        """
        if stream:
            return self.client.continuation(calls.generate_stream(self.id, prompt, checkpoint, **sampling))
        return self.client.send(calls.generate(self.id, prompt, checkpoint, **sampling))

    def wait(self, on_event: Callable[[JobEvent], None] | None = None) -> schemas.JobView:
        """Follow the job to its end, through pauses too, and return it; `on_event` is called with each event.

        A broken connection is resumed where it broke, for about a minute; then `Unreachable` is raised.
        """
        _each(self.events(), on_event)
        return self.refresh()

    def events(self, last_event_id: str | None = None) -> Iterator[JobEvent]:
        """Each event from the first, or after `last_event_id`, until the job has ended."""
        return _follow(self.client, EventCursor(self.id, last_event_id))

    def download(self, which: CheckpointSelector, name: str, to: str | Path) -> Path:
        """Write a file of a checkpoint to `to`, a folder or a new file's path, and verify its size and SHA-256."""
        return self._download(self.checkpoint(which), name, Path(to))

    def download_checkpoint(self, which: CheckpointSelector, to: str | Path) -> list[Path]:
        """Write all files of a checkpoint into the folder `to`, which is made if it is missing."""
        folder = make_folder(to)
        checkpoint = self.checkpoint(which)
        return [self._download(checkpoint, name, folder) for name in file_names(checkpoint)]

    def _download(self, checkpoint: schemas.CheckpointView, name: str, to: Path) -> Path:
        call = calls.download(self.id, checkpoint.percent, name)
        retry_policy = RetryPolicy(call.repeatable, STREAM_RETRIES)
        while True:
            try:
                with self.client.open(call) as response, Download(name, to, recorded_file(checkpoint, name)) as file:
                    for chunk in response.iter_bytes():
                        file.feed(chunk)
                    return file.finish()
            except (httpx.TransportError, ClientError) as failure:
                time.sleep(retry_policy.delay_after(failure))

    def __repr__(self) -> str:
        return f"<JobHandle {self.id} {self.view.status}>"

    def _repr_html_(self) -> str:
        """The job as it is now, for a notebook: status, the curve of its loss, each quarter. Without an answer of the
        service, as it was last."""
        try:
            return job_html(self.refresh(), self.metrics(points=NOTEBOOK_POINTS, tokens=False))
        except NO_ANSWER:
            return job_html(self.view, None)


class SweepHandle(SweepFields):
    """A sweep of the service: its fields as last answered, and the requests about it."""

    def __init__(self, client: Client, view: schemas.SweepView) -> None:
        self.client = client
        self.view = view

    refresh = _sweep_method(calls.get_sweep)
    cancel = _sweep_method(calls.cancel_sweep)
    pause = _sweep_method(calls.pause_sweep)
    resume = _sweep_method(calls.resume_sweep)
    delete = _sweep_method(calls.delete_sweep)

    def jobs(self) -> Iterator[JobHandle]:
        """Its jobs in the order of submission, each fetched as it is asked for."""
        for job_id in self.view.job_ids or self.refresh().job_ids or ():
            yield self.client.job(job_id)

    def generate(
        self, prompt: str, checkpoint: CheckpointSelector = "latest", **sampling: Any
    ) -> schemas.GenerateTargetsResponse:
        """Continue `prompt` from the same checkpoint of each of its jobs: `Client.generate` of this sweep."""
        job_ids = self.view.job_ids or self.refresh().job_ids or ()
        targets = [(job_id, checkpoint) for job_id in job_ids]
        return self.client.send(calls.generate_targets(targets, prompt, **sampling))

    def compare(
        self,
        metrics: Sequence[str] | None = None,
        *,
        perplexity: float | None = None,
        best: str | None = None,
        at_step: int | None = None,
    ) -> Comparison:
        """Its jobs side by side, as far as they have come: `Client.compare` of this sweep."""
        return self.client.compare(sweep=self.id, metrics=metrics, perplexity=perplexity, best=best, at_step=at_step)

    def series(self, points: int | None = None) -> list[schemas.JobEnvelope]:
        """The training curves of its jobs: `Client.compare_series` of this sweep."""
        return self.client.compare_series(sweep=self.id, points=points)

    def plot(self, metrics: Sequence[str] | None = None) -> Comparison:
        """`compare`, with the training curves read now: `Client.plot` of this sweep."""
        return self.client.plot(sweep=self.id, metrics=metrics)

    def wait(self, on_event: Callable[[JobEvent], None] | None = None) -> schemas.SweepView:
        """Follow all of its jobs to their ends and return the sweep; `on_event` is called with each event.

        A broken connection is resumed where it broke, for about a minute; then `Unreachable` is raised.
        """
        _each(self.events(), on_event)
        return self.refresh()

    def events(self, last_event_id: str | None = None) -> Iterator[JobEvent]:
        """Each event of any of its jobs from the first, or after `last_event_id`, until all have ended."""
        return _follow(self.client, SweepEventCursor(self.id, last_event_id))

    def __repr__(self) -> str:
        return f"<SweepHandle {self.id} {self.view.status}>"

    def _repr_html_(self) -> str:
        """The sweep as it is now, for a notebook: counts, and the comparison of its jobs. Without an answer of the
        service, as it was last."""
        try:
            return sweep_line(self.refresh()) + self.compare()._repr_html_()
        except NO_ANSWER:
            return sweep_line(self.view)


def _each(events: Iterator[JobEvent], on_event: Callable[[JobEvent], None] | None) -> None:
    for event in events:
        if on_event is not None:
            on_event(event)


def _follow(client: Client, cursor: EventCursor) -> Iterator[JobEvent]:
    """The events of a stream to its end; a broken connection is resumed where it broke."""
    retry_policy = RetryPolicy(True, STREAM_RETRIES)
    while not cursor.ended:
        try:
            with client.open(cursor.call()) as response:
                cursor.opened(response)
                for chunk in response.iter_bytes():
                    retry_policy = RetryPolicy(True, STREAM_RETRIES)
                    yield from cursor.feed(chunk)
                cursor.closed(response)
        except (httpx.TransportError, ClientError) as failure:
            time.sleep(retry_policy.delay_after(failure))
