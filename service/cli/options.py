"""Options that many commands share, and what they mean."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from service.cli.knobs import complete_knob
from service.cli.mistakes import Mistake
from service.client import Client
from service.settings import Settings

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="NANOMOE_URL", help="The service; where NANOMOE_HOST and _PORT point unless given."),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or latest.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KNOB=VALUE",
        help="Change a knob, e.g. lr=1e-3; as often as you like. nanomoe knobs lists them.",
        autocompletion=complete_knob,
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A JSON file of knobs.")]


def settings() -> Settings:
    """The environment's settings; a wrong one is a usage error that names its variable."""
    try:
        return Settings()
    except ValidationError as error:
        faults = (f"NANOMOE_{'.'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors())
        raise Mistake("; ".join(faults)) from None


def connect(url: str | None) -> Client:
    """The client of the service at `url`, or where this environment's own service would listen."""
    if url is None:
        here = settings()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(here.host, here.host)  # noqa: S104 - read, not bound
        url = f"http://[{host}]:{here.port}" if ":" in host else f"http://{host}:{here.port}"
    try:
        return Client(url)
    except ValueError as error:
        raise Mistake(str(error)) from None
