"""Keeps one worker running as a child process: starts it again after a crash, until it is drained or ends by itself.

An engine runs a pilot where it has placed a worker. Knows no engine, and of the worker its options and exit statuses.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import structlog

from service.engines.fleet import PlacedWorker, WorkerState

log = structlog.get_logger(__name__)

WORKER = (sys.executable, "-P", "-m", "worker")
"""Starts a worker by this code's own interpreter. -P: a folder named `worker` in the working directory must not be
imported."""

DRAIN_SECONDS = 120.0
"""Time from the first request to stop to SIGKILL: several times what a worker gives its jobs to write snapshots."""

NOW_SECONDS = 15.0
"""The same from a request to stop at once."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a worker that crashed is started again; doubled with each crash in a row."""

_LONG_RUN = 60.0
"""Seconds after which a crash is the first of a row again."""

_TICK = 0.1
"""Seconds between two looks at the child."""

_REFUSED = 2
"""Exit status of a worker whose settings or machine forbid the start."""


class Pilot:
    """One worker, kept running. `run` blocks; the other methods may be called from any thread."""

    def __init__(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str], *, command: Sequence[str] = WORKER
    ) -> None:
        """`arguments` and `environment` are added to the command and to this process's environment."""
        self._name = name
        self._command = [*command, *arguments, "--parent", str(os.getpid())]
        self._environment = {**os.environ, **environment}
        self._state: WorkerState = "starting"
        self._pid: int | None = None
        self._restarts = 0
        self._reason: str | None = None
        self._stop = threading.Event()
        self._kill_at = float("inf")
        self._is_urgent = False

    def report(self) -> PlacedWorker:
        """The worker now, without its host."""
        return PlacedWorker(self._name, self._state, pid=self._pid, restarts=self._restarts, reason=self._reason)

    def stop(self, *, now: bool = False) -> None:
        """Have the worker return its jobs to the queue and end: with snapshots, unless `now`. Idempotent."""
        self._kill_at = min(self._kill_at, time.monotonic() + (NOW_SECONDS if now else DRAIN_SECONDS))
        self._is_urgent |= now
        self._stop.set()

    def run(self) -> PlacedWorker:
        """Keep the worker running until it was stopped, ended by itself or is refused; returns the last report."""
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            began = time.monotonic()
            status, said = self._run_once()
            if status in (0, _REFUSED) or self._stop.is_set():
                self._state, self._reason = ("refused", said) if status == _REFUSED else ("ended", None)
                break
            pause = _FIRST_PAUSE if time.monotonic() - began > _LONG_RUN else pause
            self._state, self._reason = "pausing", f"exited with status {status}; started again in {pause:g} s"
            log.error("worker_crashed", worker=self._name, exit_status=status, next_try_in=pause)
            self._stop.wait(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)
            self._restarts += 1
        else:
            self._state = "ended"
        log.info("pilot_ended", worker=self._name, state=self._state, reason=self._reason)
        return self.report()

    def _run_once(self) -> tuple[int, str]:
        """Start the worker and wait for its end. Its exit status, or minus the signal; and why it refused to start."""
        try:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # on which it says only why it refuses to start
                process_group=0,  # a terminal's Ctrl-C reaches the pilot alone, which then stops it in order
            )
        except OSError as error:  # no process, no memory
            log.error("worker_not_started", worker=self._name, error=str(error))
            return 1, str(error)
        assert child.stdout is not None
        with child.stdout:
            self._state, self._pid, self._reason = "running", child.pid, None
            log.info("worker_process_started", worker=self._name, pid=child.pid)
            self._wait_for(child)
            self._pid = None
            return child.returncode, _read_what_is_there(child.stdout.fileno())

    def _wait_for(self, child: subprocess.Popen[bytes]) -> None:
        """Wait for the child's end, and pass on what `stop` asks for."""
        told = told_urgently = False
        while child.poll() is None:
            if self._stop.is_set():
                self._state = "draining"
                if not told:
                    told = True
                    child.send_signal(signal.SIGTERM)
                if self._is_urgent and not told_urgently:
                    told_urgently = True
                    child.send_signal(signal.SIGINT)  # its second signal; a second SIGTERM might merge with the first
                if time.monotonic() > self._kill_at:
                    log.error("worker_killed", worker=self._name, pid=child.pid)
                    child.kill()
            time.sleep(_TICK)


def _read_what_is_there(pipe: int) -> str:
    """The text in a pipe, which a process that the worker started may still hold open."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1 << 16).decode(errors="replace").strip()
    except BlockingIOError:
        return ""
