"""Options that many commands share, and what they mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.addresses import own_url
from service.cli.knobs import complete_knob
from service.cli.mistakes import Mistake
from service.client import Client
from service.client.connection import URL_VARIABLE
from service.errors import StartRefused

if TYPE_CHECKING:
    from service.settings import Settings

Url = Annotated[
    str | None,
    typer.Option("--url", envvar=URL_VARIABLE, help="The service; where NANOMOE_HOST and _PORT point unless given."),
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


def settings() -> "Settings":
    """The environment's settings; a wrong one is a usage error that names its variable."""
    from service.settings import read_settings  # not needed by a command that is told where the service is

    try:
        return read_settings()
    except StartRefused as error:
        raise Mistake(str(error).replace("\n", "; ")) from None


def connect(url: str | None) -> Client:
    """The client of the service at `url`, or where this environment's own service would listen."""
    if url is None:
        url = own_url()
    try:
        return Client(url)
    except ValueError as error:
        raise Mistake(str(error)) from None
