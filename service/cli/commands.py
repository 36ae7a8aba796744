"""How a command is found and called: its module is imported when it runs, and its arguments are looked at first.

`nanomoe --help` lists what it knows by name, and imports none of it.
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
    """A command whose arguments are sound before it begins: `~` in a path is expanded, and a text is a text."""

    def invoke(self, ctx: Any) -> Any:
        """Run it. Raises UsageError for an argument that holds bytes of another encoding."""
        for parameter in self.params:
            if parameter.name in ctx.params:
                metavar = getattr(parameter, "metavar", None)
                options = [name for name in parameter.opts if name.startswith("--")]
                shown = options[0] if options else metavar or parameter.name.upper()
                ctx.params[parameter.name] = _sound(ctx.params[parameter.name], shown, metavar == "FILE")
        return super().invoke(ctx)


def _sound(value: Any, name: str, is_file: bool) -> Any:
    match value:
        case list():
            return [_sound(one, name, is_file) for one in value]
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
    """Python keeps each byte of an argument that it cannot decode as half of a surrogate pair, which is no character.
    Paths may hold such bytes; a text cannot be sent with them."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise UsageError(
            f"{name} {given!a} is not in this terminal's encoding, {encoding}: "
            f"its character {error.start} is the byte {ord(given[error.start]) & 0xFF:#04x}"
        ) from None


class LazyCommand(TyperCommand):
    """Stands for a command in the list of commands, and becomes it when it is called."""

    def __init__(self, name: str, summary: str, panel: str, target: str) -> None:
        """`target`: `module:name` of its function, or of a Typer application with commands of its own."""
        super().__init__(name, help=summary, rich_help_panel=panel)
        self._target = target

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """The context of the command itself, which is imported now."""
        return self.load().make_context(*args, **kwargs)

    def load(self) -> Any:
        """The command that this one stands for."""
        module, _, name = self._target.partition(":")
        found = getattr(import_module(module), name)
        if isinstance(found, typer.Typer):
            return get_command(found)
        return as_command(found)


def as_command(function: Callable[..., None]) -> Any:
    """The command that calls `function`, whose parameters are its arguments and whose docstring is its help."""
    app = typer.Typer(add_completion=False)
    app.command(cls=Command)(function)
    return get_command(app)
