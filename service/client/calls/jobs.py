"""Calls about jobs and their checkpoints."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal
from uuid import uuid4

from nanomoe.config import JobConfig
from service.client.calls.call import Call, as_bytes, as_text, listed, parsed, path_of, stream_of_events
from service.http import schemas

Config = JobConfig | Mapping[str, Any]
"""The knobs that differ from the reference run."""

CheckpointSelector = schemas.Percent | Literal["latest"]
"""Selects a checkpoint of a job: its percent, or the newest."""


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
        parsed(schemas.JobView),
        body=_submission(text, config, name, tags, priority, run_at),
        headers={"Idempotency-Key": idempotency_key or uuid4().hex},
    )


def estimate(text: str, config: Config | None = None) -> Call[schemas.Estimate]:
    """Size, steps and warnings that the job would have. Nothing is submitted."""
    body = _submission(text, config, None, None, 0, None)
    return Call("POST", "/jobs", parsed(schemas.Estimate), params={"dry_run": True}, body=body)


def list_jobs(
    *,
    status: str | None = None,
    tag: str | None = None,
    name: str | None = None,
    id_prefix: str | None = None,
    q: str | None = None,
    limit: int | None = None,
    cursor: str | None = None,
    counts: bool = False,
) -> Call[schemas.JobPage]:
    """A page of jobs, newest first; `tag` is `key` or `key=value`, `id_prefix` the beginning of an id, `q` a part of
    the name or the beginning of an id."""
    params = {
        "status": status,
        "tag": tag,
        "name": name,
        "id_prefix": id_prefix,
        "q": q,
        "limit": limit,
        "cursor": cursor,
        "counts": counts or None,
    }
    return Call("GET", "/jobs", parsed(schemas.JobPage), params=params)


def get_job(job_id: str, *, wait: float = 0, seen: schemas.Status | None = None) -> Call[schemas.JobView]:
    """The job of that id, name, or unique beginning of an id, as it is now; with `wait`, once its status differs from
    `seen`, or after that many seconds."""
    params = {"wait": wait or None, "seen": seen}
    return Call("GET", _job(job_id), parsed(schemas.JobView), params=params, read_seconds=30 + wait)


def update(job_id: str, *, name: str | None = None, tags: Mapping[str, str] | None = None) -> Call[schemas.JobView]:
    """Change the name or the tags of the job; None leaves a field unchanged."""
    changes: dict[str, Any] = {"name": name, "tags": None if tags is None else dict(tags)}
    body = {key: value for key, value in changes.items() if value is not None}
    return Call("PATCH", _job(job_id), parsed(schemas.JobView), body=body)


def text(job_id: str) -> Call[str]:
    """The training text of the job."""
    return Call("GET", _job(job_id, "text"), as_text)


def cancel(job_id: str) -> Call[schemas.JobView]:
    """Request that the job stops for good; its checkpoints stay."""
    return Call("POST", _job(job_id, "cancel"), parsed(schemas.JobView))


def pause(job_id: str) -> Call[schemas.JobView]:
    """Request that the job stops until it is resumed."""
    return Call("POST", _job(job_id, "pause"), parsed(schemas.JobView))


def resume(job_id: str) -> Call[schemas.JobView]:
    """Put a paused job back into the queue, to continue where it stopped."""
    return Call("POST", _job(job_id, "resume"), parsed(schemas.JobView))


def delete(job_id: str) -> Call[None]:
    """Delete a finished job and its files. Not repeatable: the second answer would be that there is no such job."""
    return Call("DELETE", _job(job_id), lambda response: None, repeatable=False)


def metrics(
    job_id: str,
    *,
    points: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    tokens: bool = True,
) -> Call[schemas.Metrics]:
    """Figures of each checkpoint, and the step series, or a part of it, in at most `points` entries that keep its
    extremes."""
    params = {"points": points, "from_step": from_step, "to_step": to_step, "tokens": None if tokens else False}
    return Call("GET", _job(job_id, "metrics"), parsed(schemas.Metrics), params=params)


def metrics_csv(job_id: str) -> Call[str]:
    """The step series as CSV."""
    return Call("GET", _job(job_id, "metrics.csv"), as_text)


def checkpoints(job_id: str) -> Call[list[schemas.CheckpointView]]:
    """The recorded checkpoints, by percent, with their files."""
    return Call("GET", _checkpoints(job_id), listed(schemas.CheckpointView))


def checkpoint(job_id: str, which: CheckpointSelector = "latest") -> Call[schemas.CheckpointView]:
    """One recorded checkpoint, with its files."""
    return Call("GET", _checkpoints(job_id, str(which)), parsed(schemas.CheckpointView))


def reconstruction(
    job_id: str, which: CheckpointSelector = "latest", *, start: int = 0, count: int | None = None
) -> Call[schemas.ReconstructionPage]:
    """Targets of a checkpoint's reconstruction, from index `start`."""
    path = _checkpoints(job_id, str(which), "reconstruction")
    return Call("GET", path, parsed(schemas.ReconstructionPage), params={"from": start, "count": count})


def download(job_id: str, percent: int, name: str) -> Call[bytes]:
    """A file of a checkpoint; the clients read it as a stream."""
    path = _checkpoints(job_id, str(percent), "files", name)
    return Call("GET", path, as_bytes, redirects=True)


def events(job_id: str, last_event_id: str | None) -> Call[bytes]:
    """The job's events after `last_event_id`, a stream."""
    return stream_of_events(_job(job_id, "events"), last_event_id)


def changed_knobs(config: Config | None) -> dict[str, Any]:
    """The knobs that `config` sets, as JSON values."""
    return dict(config.model_dump(mode="json", exclude_unset=True) if isinstance(config, JobConfig) else config or {})


def _job(job_id: str, *parts: str) -> str:
    return path_of("jobs", job_id, *parts)


def _checkpoints(job_id: str, *parts: str) -> str:
    return _job(job_id, "checkpoints", *parts)


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
    if changed := changed_knobs(config):
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
