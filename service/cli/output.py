"""JSON output, and escapes for characters that the terminal's encoding lacks."""

import codecs
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

_PLAIN = {"–": "-", "…": "...", "│": "|", "━": "-", "╸": "-", "╺": "-"} | dict(zip("▁▂▃▄▅▆▇█", "_.,:-=+#", strict=True))
"""Substitutes for our own symbols in such encodings; a user's text is escaped instead."""


def print_json(value: Any) -> None:
    """One JSON value on standard output; pydantic objects as the service writes them."""
    print(to_json(value, indent=2))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that standard output can show: what is not ASCII is escaped unless the output is UTF-8."""
    is_utf_8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    return json.dumps(value, ensure_ascii=not is_utf_8, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    from pydantic import BaseModel

    assert isinstance(value, BaseModel), f"{type(value)} is not for JSON"
    return value.model_dump(mode="json")


@contextmanager
def escaping() -> Iterator[None]:
    """Within it, a character that the output's encoding lacks is printed as its escape, such as `\\xe1`, as Python does
    on standard error. At the end a line on standard error reports that, once."""
    lacking: set[str] = set()

    def escape(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        shown = ""
        for character in error.object[error.start : error.end]:
            if character in _PLAIN:
                shown += _PLAIN[character]
            else:
                shown += character.encode("ascii", "backslashreplace").decode()
                # Half of a surrogate pair is a byte of a file's name, which no encoding has.
                if not "\ud800" <= character <= "\udfff":
                    lacking.add(error.encoding)
        return shown, error.end

    codecs.register_error("nanomoe-escape", escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nanomoe-escape")
    try:
        yield
    finally:
        _flush()
        for encoding in lacking:
            note = f"some characters are not in this terminal's encoding, {encoding}, and shown as their escapes"
            print(f"nanomoe: {note}; PYTHONIOENCODING=utf-8 prints them", file=sys.stderr)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as in `| head`. Python flushes again when it exits, which would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
