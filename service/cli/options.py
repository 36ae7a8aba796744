"""Options that many commands share, and what they mean."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.knobs import complete_knob
from service.cli.mistakes import Mistake
from service.client import Client
from service.errors import StartRefused
from service.settings import Settings, read_settings

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
        return read_settings()
    except StartRefused as error:
        raise Mistake(str(error).replace("\n", "; ")) from None


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
