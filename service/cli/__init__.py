"""The command line `nanomoe`. This file names every command and says what an exit code means.

Exit codes: 0 done; 1 a job failed, was cancelled, a child process ended by itself, or fsck found a fault; 2 a mistake
in what was asked; 3 the service does not answer; 130 Ctrl-C.
"""

import sys
from typing import Annotated

import typer

from nanomoe import __version__
from service.cli import bench, examine, jobs, knobs, local, serve, text, upkeep
from service.cli.mistakes import Mistake
from service.cli.processes import ChildFailed
from service.client import ClientError, Problem, Unavailable, UnexpectedAnswer, Unreachable

app = typer.Typer(
    name="nanomoe",
    help="Train very small language models on your own machine, and watch them learn.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for panel, commands in {
    "Service": (serve.serve, serve.demo, jobs.workers, upkeep.backup, upkeep.fsck),
    "Jobs": (jobs.submit, jobs.watch, jobs.jobs, jobs.metrics, jobs.cancel, jobs.pause, jobs.resume, jobs.delete),
    "Models": (jobs.generate, examine.score, examine.inspect, examine.explain, local.export),
    "Without a service": (local.train, knobs.knobs),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(bench.app, rich_help_panel="Without a service")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nanomoe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train very small language models on your own machine, and watch them learn."""


def main() -> None:
    """The console script: run a command; what goes wrong in known ways is one line on standard error."""
    try:
        app()
    except Mistake as error:
        _fail(str(error), 2)
    except (Unreachable, Unavailable, UnexpectedAnswer) as error:
        hint = f"; start it with: {text.program()} serve" if isinstance(error, Unreachable) else ""
        _fail(f"{error}{hint}", 3)
    except Problem as error:
        _fail(f"{error.code}: {error.detail}{_places(error)}", 2)
    except ClientError as error:
        _fail(str(error), 3)
    except ChildFailed as error:
        _fail(str(error), 1)


def _places(error: Problem) -> str:
    """What is wrong where, as far as the detail does not say it."""
    said = (f"{'.'.join(map(str, fault.loc))}: {fault.msg}" for fault in error.errors if fault.msg not in error.detail)
    places = "; ".join(said)
    return f" ({places})" if places else ""


def _fail(message: str, code: int) -> None:
    text.console(stderr=True).print(f"nanomoe: {message}", style=text.WRONG)
    sys.exit(code)
