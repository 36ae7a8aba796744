"""Typer commands that are imported when they run, and whose arguments are checked first.

`nanomoe --help` lists the commands without importing them.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from service.cli.usage_error import UsageError


class Command(TyperCommand):
    """A command whose arguments are prepared before it runs: `~` in a path is expanded, and texts must be decodable."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises UsageError for an argument with bytes of another encoding."""
        for parameter in self.params:
            if parameter.name in ctx.params:
                metavar = getattr(parameter, "metavar", None)
                options = [name for name in parameter.opts if name.startswith("--")]
                shown = options[0] if options else metavar or parameter.name.upper()
                ctx.params[parameter.name] = _prepared(ctx.params[parameter.name], shown, metavar == "FILE")
        return super().invoke(ctx)


def _prepared(value: Any, name: str, is_file: bool) -> Any:
    match value:
        case list():
            return [_prepared(one, name, is_file) for one in value]
        case Path():
            return _expanded(value)
        case str() if is_file:
            return value if value == "-" else str(_expanded(Path(value)))
        case str():
            _check_text(value, name)
    return value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        return path  # no such user: a folder of that name, as for the shell


def _check_text(given: str, name: str) -> None:
    """Raise UsageError for undecodable bytes, which Python represents as lone surrogates. Paths may hold them; a text
    with them cannot be sent."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise UsageError(
            f"{name} {given!a} is not in this terminal's encoding, {encoding}: "
            f"its character {error.start} is the byte {ord(given[error.start]) & 0xFF:#04x}"
        ) from None


class LazyCommand(TyperCommand):
    """A placeholder in the list of commands, which imports the command when it is called."""

    def __init__(self, name: str, summary: str, panel: str, target: str) -> None:
        """`target`: `module:name` of its function, or of a Typer application with commands of its own."""
        super().__init__(name, help=summary, rich_help_panel=panel)
        self._target = target

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Import the command, and return its context."""
        return self.load().make_context(*args, **kwargs)

    def load(self) -> Any:
        """Import the command."""
        module, _, name = self._target.partition(":")
        found = getattr(import_module(module), name)
        if isinstance(found, typer.Typer):
            return get_command(found)
        command = as_command(found)
        command.name = self.name  # the function of `import` cannot have its name
        return command


def as_command(function: Callable[..., None]) -> Any:
    """The command that calls `function`, whose parameters are its arguments and whose docstring is its help."""
    app = typer.Typer(add_completion=False)
    app.command(cls=Command)(function)
    return get_command(app)
