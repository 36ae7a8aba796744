"""The command line `nanomoe`. This file names every command and says what an exit code means.

Exit codes: 0 done; 1 a job failed, was cancelled, a child process ended by itself, or fsck found a fault; 2 a mistake
in what was asked; 3 the service does not answer; 130 Ctrl-C.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nanomoe import __version__
from service.cli.commands import LazyCommand
from service.cli.output import escaping

COMMANDS = {
    "Service": {
        "serve": "Start API and worker, and end both with Ctrl-C. Settings are NANOMOE_ variables, and .env.",
        "demo": "Train the bundled paragraph, show each quarter, generate from it, and stop what was started.",
        "workers": "The workers, and what they are doing.",
        "backup": "Copy the database while everything is running, and say what else a backup needs.",
        "fsck": "Compare every checkpoint and snapshot in the database with its files, byte for byte.",
    },
    "Jobs": {
        "submit": "Train a model on a text.",
        "watch": "Follow a job to its end: a bar, and each quarter as it is recorded. Ctrl-C leaves the job running.",
        "jobs": "The newest jobs.",
        "metrics": "Figures of each quarter, what it reconstructs and continues, and the shape of the training loss.",
        "cancel": "Stop a job for good; its checkpoints stay.",
        "pause": "Stop a job until it is resumed.",
        "resume": "Let a paused job go on where it stopped.",
        "delete": "Delete a finished job, its metrics and its checkpoints.",
    },
    "Models": {
        "generate": "Continue a prompt from one checkpoint, or from several with the same seed.",
        "score": "How well a checkpoint knows any text: memorised or learned?",
        "inspect": "What a prompt makes a checkpoint do: next tokens, attention, routing. --json has every number.",
        "explain": "Show how a mixture of experts routes one token: logits, probabilities, choice, gates, sum.",
        "export": "Write a checkpoint in another program's format.",
    },
    "Without a service": {
        "train": "Train here and now, without a service: the same loop, the same figures, the same files.",
        "knobs": "Every knob of a job: its default, what it may be, what it does.",
        "bench": "Measure this machine, beside others who do the same work.",
    },
}
"""Every command by panel, with the first paragraph of its help, which a test compares with the command's own: importing
them all for the list takes most of a second."""

_MODULES = {
    "service.cli.serve": ("serve", "demo"),
    "service.cli.maintenance": ("backup", "fsck"),
    "service.cli.examine": ("score", "inspect", "explain"),
    "service.cli.local": ("export", "train"),
    "service.cli.knobs": ("knobs",),
}
"""Where a command's function is, if not in `service.cli.jobs`."""


def _target(name: str) -> str:
    if name == "bench":
        return "service.cli.bench:app"
    return f"{next((module for module, names in _MODULES.items() if name in names), 'service.cli.jobs')}:{name}"


class Commands(TyperGroup):
    """The commands of `COMMANDS`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for panel, commands in COMMANDS.items():
            for name, summary in commands.items():
                self.add_command(LazyCommand(name, summary, panel, _target(name)))


app = typer.Typer(
    name="nanomoe",
    cls=Commands,
    help="Train very small language models on your own machine, and watch them learn.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    with escaping():
        try:
            app()
        except Exception as error:
            message, code = _told(error)
            if code is None:
                raise
            from service.cli import text

            text.console(stderr=True).print(f"nanomoe: {message}", style=text.WRONG)
            sys.exit(code)


def _told(error: Exception) -> tuple[str, int | None]:
    """What to say about an error, and the exit code; None for one that nobody foresaw."""
    # Imported only now: a command that needs no client starts without it.
    from service.cli.addresses import how_to_reach
    from service.cli.processes import ChildFailed
    from service.cli.usage_error import UsageError
    from service.client import ClientError, Problem, Unavailable, Unreachable

    match error:
        case UsageError():
            return str(error), 2
        case Unreachable(address=str(address)):
            return f"{error}{how_to_reach(address)}", 3
        case Unavailable():
            return str(error), 3
        case Problem():
            return f"{error.code}: {error.detail}{_places(error)}", 2
        case ClientError():
            return str(error), 3
        case ChildFailed():
            return str(error), 1
        case UnicodeEncodeError():
            # A JSON escape such as "\ud800" in a config or a --set.
            return f"what was given holds {error.object[error.start : error.end]!a}, which is no character", 2
    return str(error), None


def _places(error: Any) -> str:
    """What is wrong where, as far as the detail does not say it."""
    said = (f"{'.'.join(map(str, fault.loc))}: {fault.msg}" for fault in error.errors if fault.msg not in error.detail)
    places = "; ".join(said)
    return f" ({places})" if places else ""
