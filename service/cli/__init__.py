"""The command line `nanomoe`. This file names every command and documents the exit codes.

Exit codes: 0 success; 1 a job failed or was cancelled, a child process exited unexpectedly, or fsck found a fault;
2 usage error; 3 the service does not answer; 130 Ctrl-C.
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
        "serve": "Start API and worker; Ctrl-C stops both. Settings are NANOMOE_ variables, and .env.",
        "demo": "Train the bundled paragraph, show each quarter, generate from it, and stop API and worker again.",
        "workers": "List the workers and their jobs, or run many on an engine.",
        "keys": "Make, list and revoke keys; show who changed what.",
        "backup": "Copy the database while the service runs, and print which files a backup needs too.",
        "fsck": "Verify every recorded checkpoint and snapshot against its files, byte for byte.",
    },
    "Jobs": {
        "submit": "Train a model on a text.",
        "watch": "Follow a job to its end: a bar, and each quarter as it is recorded. Ctrl-C does not stop the job.",
        "jobs": "List the newest jobs: loss, perplexity, and the knobs that differ from the defaults.",
        "metrics": "Show each quarter: figures, reconstruction, continuation; and the curve of the training loss.",
        "cancel": "Stop a job, or all of a sweep, for good; the checkpoints stay.",
        "pause": "Stop a job, or all of a sweep, until it is resumed.",
        "resume": "Put a paused job, or those of a sweep, back into the queue, to continue where it stopped.",
        "delete": "Delete a finished job, or a sweep with its jobs: metrics and checkpoints too.",
    },
    "Many jobs": {
        "sweep": "Train many models that differ in a few knobs.",
        "sweeps": "List the newest sweeps: how many of their jobs have ended, and what varies.",
        "compare": "Show jobs side by side: what differs, the figures, the best, the curves.",
        "presets": "List the ready experiments.",
        "run": "Run a ready experiment, and compare its jobs.",
    },
    "Models": {
        "generate": "Continue a prompt from one checkpoint, or from several with the same seed.",
        "score": "Compute the loss of any text under a checkpoint, and what of it was memorised.",
        "inspect": "Show next tokens, attention and routing of a checkpoint at a prompt. --json has every number.",
        "experts": "Show the experts of a checkpoint: load, importance, loss without each, its top tokens.",
        "explain": "Show how a mixture of experts routes one token: logits, probabilities, choice, gates, sum.",
        "import": "Bring in weights of another program: nanoGPT's ckpt.pt, or the folder of a Hugging Face GPT-2.",
        "export": "Write a checkpoint in another program's format.",
    },
    "Without a service": {
        "train": "Train in this process, without a service: the same loop, figures and files.",
        "knobs": "List every knob of a job: default, bounds and meaning.",
        "bench": "Benchmark this machine, beside other implementations of the same work.",
    },
}
"""Every command by panel, with the first paragraph of its help, which a test compares with the command's own: importing
all commands for the list would take most of a second."""

_MODULES = {
    "service.cli.serve": ("serve", "demo"),
    "service.cli.maintenance": ("backup", "fsck"),
    "service.cli.examine": ("score", "inspect", "experts", "explain"),
    "service.cli.local": ("export", "train"),
    "service.cli.knobs": ("knobs",),
    "service.cli.sweeps": ("sweep", "sweeps", "compare", "presets", "run"),
}
"""Modules of the commands that are not in `service.cli.jobs`."""


def _target(name: str) -> str:
    if name == "bench":
        return "service.cli.bench:app"
    if name in ("keys", "workers"):
        return f"service.cli.{name}:app"
    if name == "import":
        return "service.cli.model_import:import_model"
    return f"{next((module for module, names in _MODULES.items() if name in names), 'service.cli.jobs')}:{name}"


class Commands(TyperGroup):
    """The group of the commands in `COMMANDS`."""

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
    """The console script: run a command; an expected error is one line on standard error."""
    # httpx imports its own command line where click is installed, and with it pygments: an eighth of `nanomoe jobs`.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    with escaping():
        try:
            app()
        except Exception as error:
            message, code = _message_and_exit_code(error)
            if code is None:
                raise
            from service.cli import text

            text.console(stderr=True).print(f"nanomoe: {message}", style=text.WRONG)
            sys.exit(code)


def _message_and_exit_code(error: Exception) -> tuple[str, int | None]:
    """The message of an error, and the exit code; None for an unexpected exception."""
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
        case Problem(candidates=[_, *_]):
            return f"{error.code}: {error.detail}{_candidates(error)}", 2
        case Problem(status=401):
            return f"{error.code}: {error.detail}; commands read the key from NANOMOE_KEY", 2
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


def _candidates(error: Any) -> str:
    """The jobs that may have been meant, a line each."""
    from service.cli.text import ago, visible

    lines = (f"{one.id}  {one.status}  {ago(one.created_at)}  {visible(one.name or '')}" for one in error.candidates)
    return "".join(f"\n  {line.rstrip()}" for line in lines)


def _places(error: Any) -> str:
    """The location and message of each fault that the detail does not name."""
    faults = (
        f"{'.'.join(map(str, fault.loc))}: {fault.msg}" for fault in error.errors if fault.msg not in error.detail
    )
    places = "; ".join(faults)
    return f" ({places})" if places else ""
