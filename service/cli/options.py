"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.addresses import own_url
from service.cli.knobs import complete_knob
from service.cli.usage_error import UsageError
from service.client import Client
from service.client.connection import URL_VARIABLE

A_JOB = "A job's id, name or unique beginning of its id, or latest for the newest job"

Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar=URL_VARIABLE, help="Address of the service; by default that of NANOMOE_HOST and NANOMOE_PORT."
    ),
]
Job = Annotated[
    str,
    typer.Argument(metavar="JOB", help=f"{A_JOB}."),
]
JobUnlessSweep = Annotated[
    str | None,
    typer.Argument(metavar="[JOB]", help=f"{A_JOB}.", show_default=False),
]
Sweep = Annotated[
    str | None,
    typer.Option(
        "--sweep",
        metavar="SWEEP",
        help="All jobs of a sweep, in place of a job: its id, name or unique beginning of its id, or latest.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KNOB=VALUE",
        help="Set a knob, e.g. lr=1e-3; may be given several times. nanomoe knobs lists them.",
        autocompletion=complete_knob,
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A JSON file with knobs.")]


def connect(url: str | None) -> Client:
    """A client of the service at `url`, or at the environment's default address."""
    if url is None:
        url = own_url()
    try:
        return Client(url)
    except ValueError as error:
        raise UsageError(str(error)) from None
