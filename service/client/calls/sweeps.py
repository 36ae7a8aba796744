"""Calls about sweeps, and the ready experiments, each of which is one."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from service.client.calls.call import Call, listed, parsed, path_of, stream_of_events
from service.client.calls.jobs import Config, changed_knobs
from service.http import schemas


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
        parsed(schemas.SweepView),
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
    return Call("POST", "/sweeps", parsed(schemas.SweepEstimate), params={"dry_run": True}, body=body)


def list_sweeps(*, limit: int | None = None, cursor: str | None = None) -> Call[schemas.Page[schemas.SweepView]]:
    """A page of sweeps, newest first, without the ids of their jobs."""
    return Call("GET", "/sweeps", parsed(schemas.Page[schemas.SweepView]), params={"limit": limit, "cursor": cursor})


def get_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """The sweep of that id, name, or unique beginning of an id, as it is now."""
    return Call("GET", _sweep(sweep_id), parsed(schemas.SweepView))


def cancel_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """Request that every job of the sweep stops for good; their checkpoints stay."""
    return Call("POST", _sweep(sweep_id, "cancel"), parsed(schemas.SweepView))


def pause_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """Request that every job of the sweep stops until it is resumed."""
    return Call("POST", _sweep(sweep_id, "pause"), parsed(schemas.SweepView))


def resume_sweep(sweep_id: str) -> Call[schemas.SweepView]:
    """Put the paused jobs of the sweep back into the queue, to continue where they stopped."""
    return Call("POST", _sweep(sweep_id, "resume"), parsed(schemas.SweepView))


def delete_sweep(sweep_id: str) -> Call[None]:
    """Delete a sweep whose jobs have ended, with them and their files. Not repeatable: the second answer would be that
    there is no such sweep."""
    return Call("DELETE", _sweep(sweep_id), lambda response: None, repeatable=False)


def sweep_events(sweep_id: str, last_event_id: str | None) -> Call[bytes]:
    """The events of all jobs of the sweep after `last_event_id`, a stream."""
    return stream_of_events(_sweep(sweep_id, "events"), last_event_id)


def presets() -> Call[list[schemas.PresetView]]:
    """The ready experiments."""
    return Call("GET", "/presets", listed(schemas.PresetView))


def run_preset(found: Sequence[schemas.PresetView], name: str) -> tuple[Call[schemas.SweepView], list[str]]:
    """The sweep of the ready experiment of that name among these, and the metrics that answer its question. Raises
    ValueError for an unknown name."""
    by_name = {preset.name: preset for preset in found}
    if name not in by_name:
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(by_name)}")
    request, compared = by_name[name].sweep, by_name[name].compare
    call = sweep(request.text, request.config, grid=request.grid, points=request.points, seeds=request.seeds, name=name)
    return call, list(compared.metric)


def _sweep(sweep_id: str, *parts: str) -> str:
    return path_of("sweeps", sweep_id, *parts)


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
        "config": changed_knobs(config) or None,
        "grid": None if grid is None else {knob: list(values) for knob, values in grid.items()},
        "points": None if points is None else [dict(point) for point in points],
        "seeds": None if seeds == 1 else seeds,
        "name": name,
        "tags": dict(tags) if tags else None,
    }
    return {field: value for field, value in given.items() if value is not None}
