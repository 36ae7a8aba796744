"""API and worker as child processes of a command, which ends them again whatever happens to itself.

Knows nothing of what they do: they are started as `python -m service` and `python -m worker`.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any, Self

LISTENING = "nanomoe listening on "
"""How the API's line begins once it can be reached; its address follows."""

GRACE_SECONDS = 30.0
"""From the polite signal to the last one: time enough for a worker to write its snapshot."""

_PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A child process ended by itself; the text says which, and what it last said."""


class Processes:
    """The children of one command. Leaving the `with` block ends them, and only them."""

    def __init__(self, environment: Mapping[str, str], logs: Path | None = None) -> None:
        """`environment` is added to this process's own. `logs`: a folder for their output; None shows it here."""
        self._environment = {**os.environ, **environment}
        self._logs = logs
        self._children: dict[str, subprocess.Popen[str]] = {}

    def start_api(self) -> str:
        """Start the API and return its address once it listens; raises `ChildFailed`."""
        child = self._start("api", "service", stdout=subprocess.PIPE)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(LISTENING):
                Thread(target=_forward, args=(child.stdout,), daemon=True).start()
                return line.removeprefix(LISTENING).strip()
        child.wait()
        raise self._failed("api", child)

    def start_worker(self) -> None:
        """Start the worker. It waits by itself until the API has made the database."""
        self._start("worker", "worker", stdout=self._log("worker") if self._logs is not None else None)

    def check(self) -> None:
        """Raise `ChildFailed` if one of them has ended."""
        for name, child in self._children.items():
            if child.poll() is not None:
                raise self._failed(name, child)

    def _start(self, name: str, module: str, *, stdout: int | IO[str] | None) -> subprocess.Popen[str]:
        child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", module],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=self._log(name) if self._logs is not None else None,
            text=True,
            # Ctrl-C in the terminal reaches this process alone, which then ends them in order.
            process_group=0,
            preexec_fn=_end_with_parent(),
        )
        self._children[name] = child
        return child

    def _log(self, name: str) -> IO[str]:
        assert self._logs is not None
        return (self._logs / f"{name}.log").open("a", encoding="utf-8")

    def _failed(self, name: str, child: subprocess.Popen[str]) -> ChildFailed:
        said = ""
        if self._logs is not None:
            last = (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            said = "\n" + "\n".join(last)
        return ChildFailed(f"the {name} ended by itself with exit code {child.returncode}{said}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for child in self._children.values():
                child.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
            for child in self._children.values():
                child.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # the grace is over, or a second Ctrl-C: no more waiting
        finally:
            for child in self._children.values():
                child.kill()
                child.wait()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP (a closed terminal) do what Ctrl-C does: the children are ended on the way out."""
    handled = (signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux: have the kernel end the child even if this process is killed without a chance to."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork nothing but the call itself is safe
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _forward(lines: IO[str]) -> None:
    for line in lines:
        sys.stdout.write(line)
        sys.stdout.flush()
