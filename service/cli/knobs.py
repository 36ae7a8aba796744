"""The config on the command line: `--set lr=1e-3`, `--config file.json`, and `nanomoe knobs`.

Everything is read from the pydantic classes; no knob is named here except where its notation differs.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.text import Text

from nanomoe.config import JobConfig
from service.cli import text
from service.cli.output import Json, print_json
from service.cli.usage_error import UsageError
from service.http.patterns import message_of


def config_of(file: Path | None, settings: list[str]) -> JobConfig:
    """The config of a JSON file, changed by `knob=value` settings; raises UsageError."""
    return validated(JobConfig, given_config(file, settings))


def given_config(file: Path | None, settings: list[str]) -> dict[str, Any]:
    """The knobs of a JSON file, changed by `knob=value` settings, whether they are valid together or not; raises
    UsageError."""
    given = _read_object(file) if file is not None else {}
    return given | settings_of(JobConfig.model_fields, settings)


def grid_of(fields: Mapping[str, FieldInfo], settings: Iterable[str]) -> dict[str, list[Any]]:
    """`["lr=1e-4,5e-3", "bias=true,false"]` -> `{"lr": [0.0001, 0.005], "bias": [True, False]}`; raises UsageError."""
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        name, values = _split(setting, fields, "value,value")
        if name in grid:
            raise UsageError(f"--grid {name} is given twice; put all of its values into one")
        grid[name] = _values(name, fields[name], values)
    return grid


def _values(name: str, field: FieldInfo, values: str) -> list[Any]:
    try:
        parsed = json.loads(f"[{values}]")
    except ValueError:
        return [_value(name, field, value.strip()) for value in values.split(",")]
    assert isinstance(parsed, list)
    return parsed


def settings_of(fields: Mapping[str, FieldInfo], settings: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-3", "use_moe=true"]` -> `{"lr": 0.001, "use_moe": True}`; values are JSON, or else plain text."""
    given: dict[str, Any] = {}
    for setting in settings:
        name, value = _split(setting, fields, "value")
        given[name] = _value(name, fields[name], value)
    return given


def validated(kind: type[JobConfig], given: Mapping[str, Any]) -> JobConfig:
    """The config; raises a UsageError that names every fault."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UsageError("; ".join(_message(kind, fault) for fault in error.errors())) from None


def _message(kind: type[BaseModel], fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"there is no {place!r}{_suggestion(kind.model_fields, place)}"
    message = message_of(fault).removeprefix("Value error, ").removeprefix("Input ")
    return f"{place} {message}" if place else message


def _split(setting: str, fields: Iterable[str], form: str) -> tuple[str, str]:
    """Name and value of a setting, which looks like `name=` and `form`; raises UsageError where it does not."""
    name, equals, value = setting.partition("=")
    if not equals:
        raise UsageError(f"{setting!r} must look like {name or 'knob'}={form}")
    if name not in fields:
        raise UsageError(f"there is no {name!r}{_suggestion(fields, name)}")
    return name, value


def _suggestion(fields: Iterable[str], name: str) -> str:
    close = difflib.get_close_matches(name, fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(fields))}"


def _value(name: str, field: FieldInfo, value: str) -> Any:
    if field.annotation is str and not value.startswith('"'):
        return value
    if name == "init_from" and not value.startswith(("{", "null")):
        from service.cli.references import Reference  # imports the client, which only this needs

        return Reference.parse(value).init_from()
    try:
        return json.loads(value)
    except ValueError:
        pass  # not JSON: a word such as cosine, or a number in another notation, such as .5
    try:
        return float(value)
    except ValueError:
        return value


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f'{file} must hold an object, such as {{"epochs": 500}}')
    return value


def complete_knob(incomplete: str) -> list[tuple[str, str]]:
    """Shell completion: the knobs that begin with `incomplete`, with their meanings."""
    return [(f"{row.name}=", row.meaning) for row in knob_rows() if row.name.startswith(incomplete)]


class KnobRow(BaseModel):
    """A row of the table of knobs."""

    name: str
    part: str
    """Summary of the class that declares the knob."""
    default: str
    bounds: str
    meaning: str


def knob_rows() -> list[KnobRow]:
    """Every knob of `JobConfig`: the model's first, then training's, then sampling's."""
    schema = JobConfig.model_json_schema()["properties"]
    return [
        KnobRow(
            name=name,
            part=(part.__doc__ or "").partition("\n")[0],
            default=json.dumps(field.default),
            bounds=_bounds(schema[name]),
            meaning=" ".join((field.description or "").split()),
        )
        for part in JobConfig.__bases__
        if issubclass(part, BaseModel)
        for name, field in part.model_fields.items()
    ]


def _bounds(schema: Mapping[str, Any]) -> str:
    """The bounds of a value, from its JSON schema: `1 to 256`, `constant or cosine`, `true or false`, `... or null`."""
    options = schema.get("anyOf", [schema])
    return " or ".join(dict.fromkeys(_bound(option) for option in options))


def _bound(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(str(choice) for choice in schema["enum"])
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "integer" | "number":
            return _interval(schema)
        case "array":
            return f"[{', '.join('number' for _ in schema['prefixItems'])}]"
        case "string":
            return "text"
    return "JOB@PERCENT"


def _interval(schema: Mapping[str, Any]) -> str:
    low = f"above {_number(schema['exclusiveMinimum'])}" if "exclusiveMinimum" in schema else _number(schema["minimum"])
    if "maximum" in schema:
        return f"{low} to {_number(schema['maximum'])}"
    end = schema["exclusiveMaximum"]
    return f"{low} to {_number(end - 1)}" if schema["type"] == "integer" else f"{low} to below {_number(end)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def knobs(
    name: Annotated[str | None, typer.Argument(help="Only knobs whose name contains this.")] = None,
    as_json: Json = False,
) -> None:
    """List every knob of a job: default, bounds and meaning."""
    rows = [row for row in knob_rows() if name is None or name in row.name]
    if not rows:
        raise UsageError(f"there is no {name!r}{_suggestion(JobConfig.model_fields, name or '')}")
    if as_json:
        print_json(rows)
        return
    console = text.console()
    part = ""
    for row in rows:
        if row.part != part:
            part = row.part
            console.print(Text(f"# {part}", "cyan"))
        console.print(Text.assemble((f"{row.name} = {row.default}", "bold"), "   ", (row.bounds, text.DIM)))
        for line in Text(row.meaning).wrap(console, min(console.width, 100) - 4):
            console.print(Text("    ").append_text(line))
