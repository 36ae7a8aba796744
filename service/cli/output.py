"""`--json`: the same answers for programs."""

import json
from typing import Annotated, Any

import typer
from pydantic import BaseModel

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def print_json(value: Any) -> None:
    """One JSON value on standard output; pydantic objects as the service writes them."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    assert isinstance(value, BaseModel), f"{type(value)} is not for JSON"
    return value.model_dump(mode="json")
