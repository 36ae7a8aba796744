"""From a sweep's request to the configs of its jobs, or why there can be none: the product of a grid, the points, the
seeds. Nothing is computed of a job here, and no row is read.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from nanomoe.config import JobConfig
from service.errors import Invalid
from service.http.patterns import message_of
from service.http.schemas.sweeps import MAX_JOBS, SweepRequest
from service.report.labels import value_label

NOT_SWEEPABLE = frozenset({"init_from", "deterministic"})
"""Knobs that all jobs of a sweep have in common: what they are compared by would not be comparable."""

MAX_NAMED = 20
"""Most faults that an error lists."""

Loc = list[str | int]
"""Path to a place in the request."""

Fault = dict[str, Any]
"""`{"loc", "msg"}`."""


@dataclass(frozen=True)
class Point:
    """A combination of what varies, before it is repeated with other seeds."""

    text: str
    config: JobConfig
    values: Mapping[str, Any]
    """What varies, by name, as the config has it; `text` as the SHA-256 of the text."""

    loc: Loc
    """Where it stands in the request."""

    label: str
    """What varies, in words."""

    seeds: range
    """The seeds of its jobs."""

    def jobs(self) -> Iterator[tuple[str, JobConfig]]:
        """A label and a config for each seed."""
        if len(self.seeds) == 1:
            yield self.label, self.config
            return
        for seed in self.seeds:
            label = ", ".join(filter(None, (self.label, f"seed={seed}")))
            yield label, self.config.model_copy(update={"seed": seed})

    def fault(self, message: str, *below: str | int) -> Fault:
        """A fault of this point; `below`: where in it."""
        is_named = self.loc[-1] != "grid"
        return {
            "loc": [*self.loc, *below],
            "msg": message if is_named or not self.label else f"{self.label}: {message}",
        }


@dataclass
class _Raw:
    """A point as the request has it."""

    values: dict[str, Any]
    loc: Loc
    text: str | None = None
    faults: list[Fault] = field(default_factory=list)


def points_of(request: SweepRequest) -> list[Point]:
    """The points of a request, all different; with their seeds at most 1,000 jobs.

    Raises Invalid `empty_sweep`, `unknown_knob`, `not_sweepable`, `sweep_too_large`, `mixed_types`, `invalid_points`,
    `repeated_points`.
    """
    raw = _of_grid(request) if request.points is None else _of_points(request)
    _refuse("invalid_points", _faults_of_base(request))
    varied = list(dict.fromkeys(name for one in raw for name in (*one.values, *(["text"] if one.text else []))))
    digests: dict[str, str] = {}
    points: list[Point] = []
    faults: list[Fault] = []
    for one in raw:
        text = request.text if one.text is None else one.text
        if text is None:
            faults.append({"loc": [*one.loc, "text"] if request.points else ["body", "text"], "msg": "Field required"})
            continue
        try:
            config = _config(request.config | one.values)
        except ValidationError as error:
            faults += _faults_of(one, error)
            continue
        last_seed = config.seed + request.seeds - 1
        if last_seed >= 2**63:
            faults.append({"loc": ["body", "seeds"], "msg": f"there is no seed {last_seed}"})
            continue
        values = {name: getattr(config, name) for name in varied if name != "text"}
        if "text" in varied:
            values["text"] = digests.setdefault(text, hashlib.sha256(text.encode("utf-8", "replace")).hexdigest())
        seeds = range(config.seed, last_seed + 1)
        points.append(Point(text, config, values, one.loc, _label(values), seeds))
    _refuse("invalid_points", faults, of=len(raw))
    _refuse_repeated(points)
    return points


def parameters_of(points: Sequence[Point]) -> list[dict[str, Any]]:
    """What varies between the jobs of these points: `{"name", "values"}` each, the values JSON."""
    values: dict[str, list[Any]] = {}
    for point in points:
        of_point = {name: [value] for name, value in point.values.items()}
        if len(point.seeds) > 1:
            of_point["seed"] = list(point.seeds)
        for name, found in of_point.items():
            known = values.setdefault(name, [])
            known += [value for value in found if value not in known]
    return [{"name": name, "values": found} for name, found in values.items()]


def _config(values: Mapping[str, Any]) -> JobConfig:
    return JobConfig.model_validate_json(to_json(values, inf_nan_mode="constants"))


def _of_grid(request: SweepRequest) -> list[_Raw]:
    grid = request.grid
    if grid is None:
        if request.seeds == 1:
            _refuse("empty_sweep", [{"loc": ["body"], "msg": "nothing varies: give grid, points or seeds"}])
        _refuse_too_many([], request.seeds)
        return [_Raw({}, ["body", "grid"])]
    if not grid:
        _refuse("empty_sweep", [{"loc": ["body", "grid"], "msg": "the grid has no knob"}])
    where: Loc = ["body", "grid"]
    _refuse_knobs((name, [*where, name]) for name in grid)
    _refuse("empty_sweep", [{"loc": [*where, name], "msg": "has no value"} for name in grid if not grid[name]])
    _refuse_too_many([len(values) for values in grid.values()], request.seeds)
    if "seed" in grid and request.seeds > 1:
        _refuse("invalid_points", [{"loc": [*where, "seed"], "msg": "give seeds, or seed in the grid, not both"}])
    for name, values in grid.items():
        _refuse_mixed(name, [*where, name], values)
    faults = []
    for name, values in grid.items():
        parsed: list[Any] = []
        for index, value in enumerate(values):
            found, value_faults = _parsed(name, value, [*where, name, index])
            faults += value_faults
            if not value_faults and found in parsed:
                _refuse(
                    "repeated_points",
                    [{"loc": [*where, name, index], "msg": f"{value_label(found)} stands there twice"}],
                )
            parsed.append(found)
    _refuse("invalid_points", faults)
    return [_Raw(dict(zip(grid, combination, strict=True)), where) for combination in product(*grid.values())]


def _of_points(request: SweepRequest) -> list[_Raw]:
    assert request.points is not None
    if not request.points:
        _refuse("empty_sweep", [{"loc": ["body", "points"], "msg": "there is no point"}])
    _refuse_too_many([len(request.points)], request.seeds)
    raw = [
        _Raw({name: value for name, value in point.items() if name != "text"}, ["body", "points", index])
        for index, point in enumerate(request.points)
    ]
    _refuse_knobs((name, [*one.loc, name]) for one in raw for name in one.values)
    for name in dict.fromkeys(name for one in raw for name in one.values):
        _refuse_mixed(name, ["body", "points"], [one.values[name] for one in raw if name in one.values])
    faults = []
    for one, point in zip(raw, request.points, strict=True):
        text = point.get("text")
        if text is not None and not (isinstance(text, str) and text):
            faults.append({"loc": [*one.loc, "text"], "msg": "Input should be a text that is not empty"})
        one.text = text.removeprefix("\ufeff") if isinstance(text, str) else None
        for name, value in one.values.items():
            faults += _parsed(name, value, [*one.loc, name])[1]
    _refuse("invalid_points", faults, of=len(raw))
    return raw


def _parsed(name: str, value: Any, loc: Loc) -> tuple[Any, list[Fault]]:
    """A knob's value as a config has it, and its faults; rules across knobs are not checked."""
    try:
        return getattr(_config({name: value}), name), []
    except ValidationError as error:
        messages = dict.fromkeys(_message(fault) for fault in error.errors() if fault["loc"][:1] == (name,))
        return value, [{"loc": loc, "msg": message} for message in messages]


def _faults_of_base(request: SweepRequest) -> list[Fault]:
    try:
        _config(request.config)
    except ValidationError as error:
        return [
            {"loc": ["body", "config", fault["loc"][0]], "msg": _message(fault)}
            for fault in error.errors()
            if fault["loc"]
        ]
    return []


def _faults_of(one: _Raw, error: ValidationError) -> list[Fault]:
    """Faults across the knobs of a point."""
    label = _label(one.values)
    return [{"loc": one.loc, "msg": _named(one.loc, label, _message(fault))} for fault in error.errors()]


def _named(loc: Loc, label: str, message: str) -> str:
    """The message of a fault: in a grid only its values say which point it is about."""
    return message if loc[-1] != "grid" or not label else f"{label}: {message}"


def _message(fault: Any) -> str:
    return message_of(fault).removeprefix("Value error, ")


def _refuse_knobs(named: Iterable[tuple[str, Loc]]) -> None:
    found = list(named)
    known = JobConfig.model_fields
    unknown = [loc for name, loc in found if name not in known]
    hint = "; texts vary in points" if any(loc[-1] == "text" for loc in unknown) else ""
    _refuse("unknown_knob", [{"loc": loc, "msg": f"there is no knob {loc[-1]!r}{hint}"} for loc in unknown])
    fixed = [loc for name, loc in found if name in NOT_SWEEPABLE]
    _refuse("not_sweepable", [{"loc": loc, "msg": f"{loc[-1]} is the same for all jobs of a sweep"} for loc in fixed])


def _refuse_too_many(lengths: Sequence[int], seeds: int) -> None:
    n_jobs = math.prod(lengths) * seeds
    if n_jobs > MAX_JOBS:
        factors = [f"{length:,}" for length in lengths] + ([f"{seeds:,} seeds"] if seeds > 1 else [])
        counted = f"{' x '.join(factors)} = {n_jobs:,} jobs" if len(factors) > 1 else f"{n_jobs:,} jobs"
        detail = f"the sweep would have {counted}; at most {MAX_JOBS:,} are taken"
        raise Invalid("sweep_too_large", detail, errors=[{"loc": ["body"], "msg": detail}])


def _refuse_mixed(name: str, loc: Loc, values: Iterable[Any]) -> None:
    kinds = dict.fromkeys(_kind(value) for value in values if value is not None)
    if len(kinds) > 1:
        _refuse(
            "mixed_types", [{"loc": loc, "msg": f"the values of {name} are of different types: {', '.join(kinds)}"}]
        )


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "text"
        case list():
            return "list"
    return "object"


def _refuse_repeated(points: Sequence[Point]) -> None:
    """Raise Invalid `repeated_points` where two jobs would be the same."""
    seen: dict[tuple[str, str], Point] = {}
    for point in points:
        for _, config in point.jobs():
            first = seen.setdefault((point.text, config.model_dump_json()), point)
            if first is not point:
                same = f"is the same job as {'.'.join(map(str, first.loc[1:]))}"
                _refuse("repeated_points", [point.fault(f"{same}, seed {config.seed}")])


def refuse_points(faults: Sequence[Fault], of: int) -> None:
    """Raise Invalid `invalid_points` for faults of some of the `of` points of a sweep, if there are any."""
    _refuse("invalid_points", faults, of=of)


def _refuse(code: str, faults: Sequence[Fault], of: int | None = None) -> None:
    if not faults:
        return
    first = faults[0]
    detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if len(faults) > 1:
        share = f"{len(faults):,} faults" + ("" if of is None else f" in {of:,} points")
        listed = f", of which {MAX_NAMED} are listed" if len(faults) > MAX_NAMED else ""
        detail = f"{share}{listed}; the first: {detail}"
    raise Invalid(code, detail, errors=faults)


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value_label(value)}" for name, value in values.items())
