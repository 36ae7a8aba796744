"""API and worker as child processes of a command, which stops them again however it ends itself.

They are started as `python -m service` and `python -m worker`.
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
"""Prefix of the line that the API prints once it accepts connections; its address follows."""

GRACE_SECONDS = 30.0
"""Time from SIGTERM to SIGKILL: enough for a worker to write its snapshots."""

_PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A child process exited unexpectedly, or does not become ready; the text names it, with the end of its log."""


class Processes:
    """The child processes of one command, which are stopped at the end of the `with` block."""

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
                reader = Thread(target=_copy_output, args=(child.stdout,), daemon=True)
                reader.start()
                self._readers.append(reader)
                return line.removeprefix(LISTENING).strip()
        child.stdout.close()
        child.wait()
        raise self._failed("api", child)

    def start_worker(self, name: str = "worker") -> None:
        """Start a worker, which waits until the API has created the database."""
        self._start(name, "worker")

    def runs(self, name: str) -> bool:
        """Whether a child of that name was started and has not ended."""
        return name in self._children and self._children[name].poll() is None

    def kill(self, name: str) -> None:
        """Kill a child with SIGKILL, and reap it."""
        self._children[name].kill()
        self._children[name].wait()

    def pid(self, name: str) -> int:
        """The process id of a child."""
        return self._children[name].pid

    def stop(self, name: str) -> None:
        """Stop a child in order, and reap it; kill it where that takes too long."""
        child = self._children[name]
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill(name)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, `ChildFailed` is raised when a child exits, whatever the caller waits for."""
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

    def log_tail(self, name: str) -> str:
        """The last lines of a child's log; empty without logs."""
        if self._logs is None:
            return ""
        lines = (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-15:])

    def _start(self, name: str, module: str, *, piped: bool = False) -> subprocess.Popen[str]:
        with (self._logs / f"{name}.log").open("a") if self._logs is not None else nullcontext() as log:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                # -P: a folder named `worker` in the working directory must not be imported.
                [sys.executable, "-P", "-m", module],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                text=True,
                # Ctrl-C in the terminal reaches this process alone, which then stops them in order.
                process_group=0,
                preexec_fn=_terminate_with_parent(),
            )
        self._children[name] = child
        return child

    def _failed(self, name: str, child: subprocess.Popen[str]) -> ChildFailed:
        ended = f"the {name} exited unexpectedly with exit code {child.returncode}"
        return ChildFailed(f"{ended}\n{self.log_tail(name)}".rstrip())

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
            pass  # the time is over, or a second Ctrl-C: kill them
        finally:
            for child in self._children.values():
                child.kill()
                child.wait()
            for reader in self._readers:
                reader.join()


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP (a closed terminal) act as Ctrl-C does, so that the children are stopped."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate_with_parent() -> Callable[[], None] | None:
    """On Linux: have the kernel send the child SIGTERM even if this process is killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork nothing but the call itself is safe
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _copy_output(lines: IO[str]) -> None:
    """Copy the rest of the API's standard output, so that the API never blocks on a full pipe."""
    with lines:
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
