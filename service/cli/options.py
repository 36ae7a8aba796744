"""Options that many commands share, and what they mean."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.addresses import own_url
from service.cli.knobs import complete_knob
from service.cli.mistakes import Mistake
from service.client import Client
from service.client.connection import URL_VARIABLE

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


def connect(url: str | None) -> Client:
    """The client of the service at `url`, or where this environment's own service would listen."""
    if url is None:
        url = own_url()
    try:
        return Client(url)
    except ValueError as error:
        raise Mistake(str(error)) from None
