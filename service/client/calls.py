"""Every request of the HTTP contract: how it is built, and how its response is parsed. One function a route.

Knows no connection and does no I/O: `Client` and `AsyncClient` send the same calls, and each of their methods that is
one request is a line that names its function here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from pydantic import BaseModel, ValidationError

from nanomoe.config import JobConfig
from nanomoe.import_messages import MODEL_FILES
from service.client.comparison import Comparison
from service.client.errors import UnexpectedAnswer, problem_of
from service.http import schemas

T = TypeVar("T")
Answer = TypeVar("Answer", bound=BaseModel)

CheckpointSelector = schemas.Percent | Literal["latest"]
"""Selects a checkpoint of a job: its percent, or the newest."""

GENERATE_SECONDS = 600
"""Read time-out of generation: for a long text on a slow machine no byte is sent earlier."""

IMPORT_SECONDS = 900
"""Read time-out of an import, longer than the service takes before it gives up."""

Config = JobConfig | Mapping[str, Any]
"""The knobs that differ from the reference run."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and the parser of its response."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    read: Callable[[httpx.Response], T]
    """Parses the body of a successful response."""

    params: Mapping[str, str | float | bool | list[str] | None] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """Parts of a form that are no files."""

    files: Sequence[Path] = ()
    """Files of a form, sent in parts named `files`."""

    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    """Whether the request is idempotent, so that it may be repeated when its response was lost."""

    read_seconds: float | None = None
    """Read time-out in seconds; None is the client's own setting."""

    @contextmanager
    def opened(self) -> Iterator[list[BinaryIO]]:
        """The files, open until the request has been sent."""
        with ExitStack() as stack:
            yield [stack.enter_context(path.open("rb")) for path in self.files]

    def request(self, http: httpx.Client | httpx.AsyncClient, files: Sequence[BinaryIO] = ()) -> httpx.Request:
        """The request, with the base address, key and time-outs of `http`. `files`: what `opened` gave."""
        timeout = http.timeout.as_dict()
        if self.read_seconds is not None:
            timeout["read"] = self.read_seconds
        form: dict[str, Any] = {}
        if files:
            names = [path.name for path in self.files]
            parts = [("files", (name, file)) for name, file in zip(names, files, strict=True)]
            form = {"data": dict(self.fields), "files": parts}
        return http.build_request(
            self.method,
            self.path,
            params={name: value for name, value in self.params.items() if value is not None},
            json=self.body,
            **form,
            headers=dict(self.headers),
            timeout=httpx.Timeout(**timeout),
        )

    def answer(self, response: httpx.Response) -> T:
        """Parse a response whose body has been read; raises `Problem` or `UnexpectedAnswer`."""
        check(response)
        return self.read(response)


def check(response: httpx.Response) -> None:
    """Raise the exception of an unsuccessful response; the body of an error must have been read."""
    if response.is_error:
        raise problem_of(response)
    if not response.is_success:
        raise UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code}, which is not in the HTTP contract"
        )


def submit(
    text: str,
    config: Config | None = None,
    *,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    priority: int = 0,
    run_at: datetime | None = None,
    idempotency_key: str | None = None,
) -> Call[schemas.JobView]:
    """Train a model on `text`. Without a key of your own each call gets one, so that a retry never submits twice."""
    return Call(
        "POST",
        "/jobs",
        _model(schemas.JobView),
        body=_submission(text, config, name, tags, priority, run_at),
        headers={"Idempotency-Key": idempotency_key or uuid4().hex},
    )


def estimate(text: str, config: Config | None = None) -> Call[schemas.Estimate]:
    """Size, steps and warnings that the job would have. Nothing is submitted."""
    body = _submission(text, config, None, None, 0, None)
    return Call("POST", "/jobs", _model(schemas.Estimate), params={"dry_run": True}, body=body)


def import_model(
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: str | None = None,
    block_size: int | None = None,
    text: str | None = None,
    name: str | None = None,
) -> Call[schemas.JobView]:
    """Bring in weights of another program as a finished job: nanoGPT's `ckpt.pt`, or the folder of a Hugging Face
    GPT-2, with the files of its tokenizer beside it or the name of one. Not repeatable: each makes a job."""
    given = {"tokenizer": tokenizer, "block_size": block_size, "text": text, "name": name}
    return Call(
        "POST",
        "/models",
        _model(schemas.JobView),
        fields={key: str(value) for key, value in given.items() if value is not None},
        files=model_files([paths] if isinstance(paths, str | Path) else paths),
        repeatable=False,
        read_seconds=IMPORT_SECONDS,
    )


def model_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files to send of these files and folders. Raises FileNotFoundError where one is missing or holds none."""
    found: list[Path] = []
    for path in map(Path, paths):
        names = [path / name for name in MODEL_FILES] if path.is_dir() else [path]
        files = [name for name in names if name.is_file()]
        if not files:
            raise FileNotFoundError(f"{path} is no model: no {' or '.join(MODEL_FILES)} is there")
        found += files
    return found


def list_jobs(
    *, status: str | None = None, tag: str | None = None, limit: int | None = None, cursor: str | None = None
) -> Call[schemas.Page[schemas.JobView]]:
    """A page of jobs, newest first; `tag` is `key` or `key=value`."""
    params = {"status": status, "tag": tag, "limit": limit, "cursor": cursor}
    return Call("GET", "/jobs", _model(schemas.Page[schemas.JobView]), params=params)


def get_job(job_id: str, *, wait: float = 0, seen: schemas.Status | None = None) -> Call[schemas.JobView]:
    """The job of that id, name, or unique beginning of an id, as it is now; with `wait`, once its status differs from
    `seen`, or after that many seconds."""
    params = {"wait": wait or None, "seen": seen}
    return Call("GET", _job(job_id), _model(schemas.JobView), params=params, read_seconds=30 + wait)


def update(job_id: str, *, name: str | None = None, tags: Mapping[str, str] | None = None) -> Call[schemas.JobView]:
    """Change the name or the tags of the job; None leaves a field unchanged."""
    changes: dict[str, Any] = {"name": name, "tags": None if tags is None else dict(tags)}
    body = {key: value for key, value in changes.items() if value is not None}
    return Call("PATCH", _job(job_id), _model(schemas.JobView), body=body)


def text(job_id: str) -> Call[str]:
    """The training text of the job."""
    return Call("GET", _job(job_id, "text"), _text)


def cancel(job_id: str) -> Call[schemas.JobView]:
    """Request that the job stops for good; its checkpoints stay."""
    return Call("POST", _job(job_id, "cancel"), _model(schemas.JobView))


def pause(job_id: str) -> Call[schemas.JobView]:
    """Request that the job stops until it is resumed."""
    return Call("POST", _job(job_id, "pause"), _model(schemas.JobView))


def resume(job_id: str) -> Call[schemas.JobView]:
    """Put a paused job back into the queue, to continue where it stopped."""
    return Call("POST", _job(job_id, "resume"), _model(schemas.JobView))


def delete(job_id: str) -> Call[None]:
    """Delete a finished job and its files. Not repeatable: the second answer would be that there is no such job."""
    return Call("DELETE", _job(job_id), lambda response: None, repeatable=False)


def metrics(job_id: str, *, points: int | None = None, tokens: bool = True) -> Call[schemas.Metrics]:
    """Figures of each checkpoint, and the step series in at most `points` entries that keep its extremes."""
    params = {"points": points, "tokens": None if tokens else False}
    return Call("GET", _job(job_id, "metrics"), _model(schemas.Metrics), params=params)


def metrics_csv(job_id: str) -> Call[str]:
    """The step series as CSV."""
    return Call("GET", _job(job_id, "metrics.csv"), _text)


def checkpoints(job_id: str) -> Call[list[schemas.CheckpointView]]:
    """The recorded checkpoints, by percent, with their files."""
    read = _model(schemas.Listing[schemas.CheckpointView])
    return Call("GET", _job(job_id, "checkpoints"), lambda response: read(response).data)


def checkpoint(job_id: str, which: CheckpointSelector = "latest") -> Call[schemas.CheckpointView]:
    """One recorded checkpoint, with its files."""
    return Call("GET", _job(job_id, "checkpoints", str(which)), _model(schemas.CheckpointView))


def reconstruction(
    job_id: str, which: CheckpointSelector = "latest", *, start: int = 0, count: int | None = None
) -> Call[schemas.ReconstructionPage]:
    """Targets of a checkpoint's reconstruction, from index `start`."""
    path = _job(job_id, "checkpoints", str(which), "reconstruction")
    return Call("GET", path, _model(schemas.ReconstructionPage), params={"from": start, "count": count})


def download(job_id: str, percent: int, name: str) -> Call[bytes]:
    """A file of a checkpoint; the clients read it as a stream."""
    path = _job(job_id, "checkpoints", str(percent), "files", name)
    return Call("GET", path, _bytes)


def events(job_id: str, last_event_id: str | None) -> Call[bytes]:
    """The job's events after `last_event_id`, a stream. The service sends a ping every 15 seconds."""
    return _stream_of_events(_job(job_id, "events"), last_event_id)


def generate(
    job_id: str, /, prompt: str, checkpoint: CheckpointSelector = "latest", **sampling: Any
) -> Call[schemas.GenerateResponse]:
    """Continue `prompt` from a checkpoint; `sampling` are the other fields of `GenerateRequest`."""
    body = {"job_id": job_id, "checkpoint": checkpoint, "prompt": prompt, **sampling}
    read = _model(schemas.GenerateResponse)
    return Call("POST", "/generate", read, body=body, repeatable=False, read_seconds=GENERATE_SECONDS)


def generate_stream(
    job_id: str, /, prompt: str, checkpoint: CheckpointSelector = "latest", **sampling: Any
) -> Call[bytes]:
    """`generate`, answered as a stream of events."""
    body = {"job_id": job_id, "checkpoint": checkpoint, "prompt": prompt, "stream": True, **sampling}
    return Call("POST", "/generate", _bytes, body=body, repeatable=False, read_seconds=GENERATE_SECONDS)


def score(job_id: str, /, text: str, checkpoint: CheckpointSelector = "latest") -> Call[schemas.ScoreResponse]:
    """The loss of each token of `text` under a checkpoint, and the longest span copied from the training text."""
    body = {"job_id": job_id, "checkpoint": checkpoint, "text": text}
    return Call("POST", "/score", _model(schemas.ScoreResponse), body=body, read_seconds=GENERATE_SECONDS)


def inspect(
    job_id: str, /, prompt: str, checkpoint: CheckpointSelector = "latest", *, attention: bool = True
) -> Call[schemas.InspectResponse]:
    """Evaluate `prompt`: the likeliest next tokens, the attention, and the routing of each token.

    With `attention` false, the response has no attention weights.
    """
    body = {"job_id": job_id, "checkpoint": checkpoint, "prompt": prompt, "attention": attention}
    return Call("POST", "/inspect", _model(schemas.InspectResponse), body=body, read_seconds=GENERATE_SECONDS)


def sweep(
    text: str | None = None,
    config: Config | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    seeds: int = 1,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    idempotency_key: str | None = None,
) -> Call[schemas.SweepView]:
    """Train many models that differ in a few knobs: each combination of the values in `grid`, or each of `points`, with
    `seeds` seeds. Without a key of your own each call gets one, so that a retry never submits twice."""
    return Call(
        "POST",
        "/sweeps",
        _model(schemas.SweepView),
        body=_sweep_request(text, config, grid, points, seeds, name, tags),
        headers={"Idempotency-Key": idempotency_key or uuid4().hex},
    )


def estimate_sweep(
    text: str | None = None,
    config: Config | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    seeds: int = 1,
) -> Call[schemas.SweepEstimate]:
    """Number, sizes, steps, warnings and predicted time that the jobs of a sweep would have. Nothing is submitted."""
    body = _sweep_request(text, config, grid, points, seeds, None, None)
    return Call("POST", "/sweeps", _model(schemas.SweepEstimate), params={"dry_run": True}, body=body)


def list_sweeps(*, limit: int | None = None, cursor: str | None = None) -> Call[schemas.Page[schemas.SweepView]]:
    """A page of sweeps, newest first, without the ids of their jobs."""
    return Call("GET", "/sweeps", _model(schemas.Page[schemas.SweepView]), params={"limit": limit, "cursor": cursor})


def get_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """The sweep as it is now."""
    return Call("GET", _sweep(sweep_id), _model(schemas.SweepView))


def cancel_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """Request that every job of the sweep stops for good; their checkpoints stay."""
    return Call("POST", _sweep(sweep_id, "cancel"), _model(schemas.SweepView))


def pause_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """Request that every job of the sweep stops until it is resumed."""
    return Call("POST", _sweep(sweep_id, "pause"), _model(schemas.SweepView))


def resume_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """Put the paused jobs of the sweep back into the queue, to continue where they stopped."""
    return Call("POST", _sweep(sweep_id, "resume"), _model(schemas.SweepView))


def delete_sweep(sweep_id: str) -> Call[None]:
    """Delete a sweep whose jobs have ended, with them and their files. Not repeatable: the second answer would be that
    there is no such sweep."""
    return Call("DELETE", _sweep(sweep_id), lambda response: None, repeatable=False)


def sweep_events(sweep_id: str, last_event_id: str | None) -> Call[bytes]:
    """The events of all jobs of the sweep after `last_event_id`, a stream."""
    return _stream_of_events(_sweep(sweep_id, "events"), last_event_id)


def compare(
    *job_ids: str,
    sweep: str | None = None,
    tag: str | None = None,
    metrics: Sequence[str] | None = None,
    perplexity: float | None = None,
    best: str | None = None,
    at_step: int | None = None,
) -> Call[Comparison]:
    """Jobs side by side: these, those of a sweep, or those with a tag. `perplexity`: for which to say when each came to
    it; `best`: the metric whose best value is named; `at_step`: the step at which to read the step series."""
    params = {
        "job": list(job_ids) or None,
        "sweep": sweep,
        "tag": tag,
        "metric": None if metrics is None else list(metrics),
        "perplexity": perplexity,
        "best": best,
        "at": None if at_step is None else f"step:{at_step}",
    }
    read = _model(schemas.Comparison)
    return Call("GET", "/compare", lambda response: Comparison(read(response)), params=params)


def compare_csv(
    *job_ids: str,
    sweep: str | None = None,
    tag: str | None = None,
    metrics: Sequence[str] | None = None,
    perplexity: float | None = None,
    best: str | None = None,
    at_step: int | None = None,
) -> Call[str]:
    """`compare` as CSV, a line for each checkpoint of each job."""
    call = compare(*job_ids, sweep=sweep, tag=tag, metrics=metrics, perplexity=perplexity, best=best, at_step=at_step)
    return Call("GET", call.path, _text, params={**call.params, "format": "csv"})


def compare_series(
    *job_ids: str, sweep: str | None = None, tag: str | None = None, points: int | None = None
) -> Call[list[schemas.JobEnvelope]]:
    """The training curves of the same jobs, each as minima and maxima of buckets of steps: at most `points` figures."""
    params = {"job": list(job_ids) or None, "sweep": sweep, "tag": tag, "points": points}
    read = _model(schemas.ComparedSeries)
    return Call("GET", "/compare/series", lambda response: read(response).jobs, params=params)


def presets() -> Call[list[schemas.PresetView]]:
    """The ready experiments."""
    read = _model(schemas.Listing[schemas.PresetView])
    return Call("GET", "/presets", lambda response: read(response).data)


def workers() -> Call[list[schemas.WorkerView]]:
    """The workers, as of their last heartbeats."""
    read = _model(schemas.Listing[schemas.WorkerView])
    return Call("GET", "/workers", lambda response: read(response).data)


def health() -> Call[schemas.Health]:
    """Whether the service is alive."""
    return Call("GET", "/healthz", _model(schemas.Health))


def readiness() -> Call[schemas.Readiness]:
    """Whether the service can take jobs; raises `Unavailable` while it cannot."""
    return Call("GET", "/readyz", _model(schemas.Readiness))


def method_signature(build: Callable[..., Any]) -> Signature:
    """The signature of a client's method that makes this call, as `help` and notebooks show it."""
    own = signature(build)
    return own.replace(parameters=[Parameter("self", Parameter.POSITIONAL_ONLY), *own.parameters.values()])


def _job(job_id: str, *parts: str) -> str:
    return "/".join(["/jobs", *(quote(part, safe="") for part in (job_id, *parts))])


def _sweep(sweep_id: str, *parts: str) -> str:
    return "/".join(["/sweeps", *(quote(part, safe="") for part in (sweep_id, *parts))])


def _stream_of_events(path: str, last_event_id: str | None) -> Call[bytes]:
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    return Call("GET", path, _bytes, headers=headers, read_seconds=45)


def _submission(
    text: str,
    config: Config | None,
    name: str | None,
    tags: Mapping[str, str] | None,
    priority: int,
    run_at: datetime | None,
) -> dict[str, Any]:
    """The body of `POST /jobs`, without fields at their defaults. Only the service validates it."""
    body: dict[str, Any] = {"text": text}
    if changed := _changed(config):
        body["config"] = changed
    if name is not None:
        body["name"] = name
    if tags:
        body["tags"] = dict(tags)
    if priority:
        body["priority"] = priority
    if run_at is not None:
        body["run_at"] = run_at.isoformat()
    return body


def _sweep_request(
    text: str | None,
    config: Config | None,
    grid: Mapping[str, Sequence[Any]] | None,
    points: Sequence[Mapping[str, Any]] | None,
    seeds: int,
    name: str | None,
    tags: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The body of `POST /sweeps`, without fields at their defaults. Only the service validates it."""
    given: dict[str, Any] = {
        "text": text,
        "config": _changed(config) or None,
        "grid": None if grid is None else {knob: list(values) for knob, values in grid.items()},
        "points": None if points is None else [dict(point) for point in points],
        "seeds": None if seeds == 1 else seeds,
        "name": name,
        "tags": dict(tags) if tags else None,
    }
    return {field: value for field, value in given.items() if value is not None}


def _changed(config: Config | None) -> dict[str, Any]:
    return dict(config.model_dump(mode="json", exclude_unset=True) if isinstance(config, JobConfig) else config or {})


def _model(kind: type[Answer]) -> Callable[[httpx.Response], Answer]:
    def read(response: httpx.Response) -> Answer:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise UnexpectedAnswer(
                f"{response.request.url} did not answer with a {kind.__name__}: another program, or another version"
            ) from error

    return read


def _bytes(response: httpx.Response) -> bytes:
    return response.content


def _text(response: httpx.Response) -> str:
    return response.content.decode()
