"""Terminal output: consoles, tables, numbers, durations, and texts with their control characters made visible.

Output fits 80 columns, and is coloured where there is a terminal. A generated text must not be able to control the
terminal. Knows no job and no connection.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

WRONG = "red"
DIM = "dim"
GOOD = "green"


def console(*, stderr: bool = False) -> Console:
    """The console of the command line; plain lines where the output is no terminal."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def program() -> str:
    """Name of this command line as the user must type it: its path where the shell would not find it, as after `make
    demo`."""
    called = Path(sys.argv[0])
    if called.name != "nanomoe" or not called.exists() or shutil.which("nanomoe") is not None:
        return "nanomoe"
    return os.path.relpath(called)


def language() -> Literal["en", "pt"]:
    """The terminal's language, where the command line speaks it."""
    given = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return "pt" if given[:2] == "pt" else "en"


@contextmanager
def waiting(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Show `what` as the current activity on standard error within the block; nothing where the output is no
    terminal."""
    shown = console(stderr=True)
    if quiet or not shown.is_terminal or not sys.stdout.isatty():
        yield
        return
    with shown.status(Text(f"{what} ...", DIM)):
        yield


def print_table(table: Table, notes: Sequence[str] = ()) -> None:
    """Print a table within the terminal's width; in a pipe at full width.

    `notes`: one for each row, shown dimmed below the row, in a pipe at its end; an empty one is not shown.
    """
    shown = console()
    shown.width = shown.width if shown.is_terminal else 10_000
    if not any(notes):
        shown.print(table)
        return
    header, *rows = shown.render_lines(table, pad=False)
    shown.print(Segments([*header, Segment.line()]), end="")
    for row, note in zip(rows, notes, strict=True):
        shown.print(Segments(row), end="")
        if note:
            shown.print(Text(("\n  " if shown.is_terminal else "  ") + note, DIM), end="")
        shown.print()


def print_piece(console: Console, prompt: str, added: str) -> None:
    """Print a generated text after its dimmed prompt, without a line end; in a pipe exactly these characters."""
    if console.is_terminal:
        shown = Text.assemble((visible_lines(prompt), DIM), visible_lines(added))
        console.print(shown, end="", soft_wrap=True)
    else:
        print(prompt + added, end="", flush=True)


def visible(text: str) -> str:
    """`text` with its control characters as symbols (U+2400 and on), line ends and tabs too: it stays on one line."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 0x20 else "␡" if 0x7F <= ord(c) < 0xA0 else c for c in text)


def visible_lines(text: str) -> str:
    """`text` as by `visible`, but with its line ends."""
    return "\n".join(visible(line) for line in text.split("\n"))


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """A fraction from 0 to 1 as a percentage; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def figure(value: float | None) -> str:
    """A number with about five digits, whatever its size; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if 100 <= abs(value) < 1e7 else f"{value:.5g}"


def duration(seconds: float) -> str:
    """`8.2 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours == 0:
        return f"{minute} min {second:02} s"
    days, hour = divmod(hours, 24)
    return f"{hour} h {minute:02} min" if days == 0 else f"{days} d {hour} h"


def ago(moment: datetime) -> str:
    """Time since `moment`, such as `8.2 s ago`."""
    return f"{duration(max(0.0, (datetime.now(UTC) - moment).total_seconds()))} ago"


def hanging(line: Text, console: Console, indent: int = 2) -> Text:
    """The line, wrapped at the terminal's width with a hanging indent; in a pipe unchanged."""
    if not console.is_terminal:
        return line
    return Text("\n" + " " * indent).join(line.wrap(console, max(20, console.width - indent)))


def millions(n: int | None) -> str:
    """A count as `1.81 M` or `12.3 k`; `?` for None."""
    if n is None:
        return "?"
    return f"{n / 1e6:,.2f} M" if n >= 1e6 else f"{n / 1e3:.1f} k" if n >= 1e3 else str(n)


def new_table(*columns: str) -> Table:
    """A table without rules; a column whose name begins with `>` is right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, no_wrap=True)
    return table


LABEL_WIDTH = 15


def label_room(console: Console) -> int:
    """Width beside a label, in columns."""
    return max(20, console.width - LABEL_WIDTH - 1)


def labelled(label: str, text: Text, console: Console, n_lines: int) -> Text:
    """A label in a column of its own, with `text` beside it, cut after `n_lines` lines."""
    room = label_room(console)
    wrapped = text.wrap(console, room, tab_size=1)
    lines = list(wrapped)[:n_lines]
    if len(wrapped) > n_lines:
        lines[-1].truncate(room - 1)
        lines[-1].append("…")
    return Text.assemble((f"{label.rjust(LABEL_WIDTH - 1)} ", DIM), Text("\n" + " " * LABEL_WIDTH).join(lines))
