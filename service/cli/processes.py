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
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread, get_ident
from types import TracebackType
from typing import IO, Any, Self

LISTENING = "nanomoe listening on "
"""How the API's line begins once it can be reached; its address follows."""

GRACE_SECONDS = 30.0
"""From the polite signal to the last one: time enough for a worker to write its snapshot."""

_PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A child process ended by itself, or does not do its work; the text says which, and what it last said."""


class Processes:
    """The children of one command. Leaving the `with` block ends them, and only them."""

    def __init__(self, environment: Mapping[str, str], logs: Path | None = None) -> None:
        """`environment` is added to this process's own. `logs`: a folder for their output; None shows it here."""
        self._environment = {**os.environ, **environment}
        self._logs = logs
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._readers: list[Thread] = []

    def start_api(self) -> str:
        """Start the API and return its address once it listens; raises `ChildFailed`."""
        child = self._start("api", "service", piped=True)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(LISTENING):
                reader = Thread(target=_drain, args=(child.stdout,), daemon=True)
                reader.start()
                self._readers.append(reader)
                return line.removeprefix(LISTENING).strip()
        child.stdout.close()
        child.wait()
        raise self._failed("api", child)

    def start_worker(self, name: str = "worker") -> None:
        """Start a worker. It waits by itself until the API has made the database."""
        self._start(name, "worker")

    def kill(self, name: str) -> None:
        """End a child without giving it a chance to do anything about it."""
        self._children[name].kill()
        self._children[name].wait()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, a child that ends by itself interrupts what the caller waits for: `ChildFailed` is raised."""
        over = Event()
        caller = get_ident()

        def watch() -> None:
            while not over.wait(0.2):
                if any(child.poll() is not None for child in self._children.values()):
                    signal.pthread_kill(caller, signal.SIGINT)
                    return

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        except KeyboardInterrupt:
            for name, child in self._children.items():
                if child.poll() is not None:
                    raise self._failed(name, child) from None
            raise
        finally:
            over.set()
            watcher.join()

    def last_words(self, name: str) -> str:
        """The end of a child's log; empty without logs."""
        if self._logs is None:
            return ""
        lines = (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-15:])

    def _start(self, name: str, module: str, *, piped: bool = False) -> subprocess.Popen[str]:
        with (self._logs / f"{name}.log").open("a") if self._logs is not None else nullcontext() as log:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                # -P: a folder named `worker` where this is called must not be taken for ours.
                [sys.executable, "-P", "-m", module],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                text=True,
                # Ctrl-C in the terminal reaches this process alone, which then ends them in order.
                process_group=0,
                preexec_fn=_end_with_parent(),
            )
        self._children[name] = child
        return child

    def _failed(self, name: str, child: subprocess.Popen[str]) -> ChildFailed:
        ended = f"the {name} ended by itself with exit code {child.returncode}"
        return ChildFailed(f"{ended}\n{self.last_words(name)}".rstrip())

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
            for reader in self._readers:
                reader.join()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP (a closed terminal) do what Ctrl-C does: the children are ended on the way out."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
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


def _drain(lines: IO[str]) -> None:
    """Show what else the API says on standard output, so that it never waits for a reader."""
    with lines:
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
