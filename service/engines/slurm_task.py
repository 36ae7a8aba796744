"""What a task of a Slurm array job runs: the pilot of one worker, and what the signals of Slurm mean to it.

SIGUSR1 and SIGINT end the task for good, in order and at once; `workers down` sends them. The signal that Slurm sends
before the time limit, SIGUSR2, drains the worker and puts the task back into Slurm's queue, and so does SIGTERM where
the task is preempted.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

import structlog
from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission

from nanomoe.logs import configure_logging
from service.engines.fleet import Fleet, PlacedWorker
from service.engines.pilot import WORKER, Pilot

log = structlog.get_logger(__name__)

DRAIN = signal.SIGUSR1
AT_ONCE = signal.SIGINT
REQUEUE = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
"""What submitit has Slurm send before the time limit, and takes as the request to queue the task again."""


class WorkerTask:
    """One worker of a fleet; submitit pickles it, and calls it on the host that Slurm has chosen."""

    def __init__(self, fleet: Fleet, index: int, command: Sequence[str] = WORKER) -> None:
        """`command` starts a worker."""
        self._fleet = fleet
        self._index = index
        self._command = command
        self._pilot: Pilot | None = None
        self._thread: threading.Thread | None = None
        self._is_over = False

    def __call__(self) -> PlacedWorker:
        """Keep the worker running until it was stopped, ended by itself or is refused; returns its last report."""
        configure_logging("json")
        fleet, index = self._fleet, self._index
        self._pilot = Pilot(
            fleet.worker_name(index),
            fleet.worker_arguments(index),
            fleet.worker_environment(index),
            command=self._command,
        )
        # Not in this thread, whose handlers have to wait for its end.
        self._thread = threading.Thread(target=self._keep_running, name="pilot")
        self._thread.start()
        signal.signal(DRAIN, self._end)
        signal.signal(AT_ONCE, self._end)
        signal.signal(signal.SIGTERM, self._terminated)
        while self._thread.is_alive():
            self._thread.join(0.5)  # a handler runs between two instructions, and never while one blocks for good
        return self._pilot.report()

    def checkpoint(self) -> DelayedSubmission | None:
        """Drain the worker. What submitit puts back into Slurm's queue then; None where the task is to end for good."""
        if self._thread is not None and self._pilot is not None:
            self._pilot.stop()
            self._thread.join()
        return None if self._is_over else DelayedSubmission(WorkerTask(self._fleet, self._index, self._command))

    def _keep_running(self) -> None:
        # Some clusters signal every process of a task (proctrack/linuxproc), and these two would kill the worker, which
        # has no handler for them. Its processes inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {DRAIN, REQUEUE})
        assert self._pilot is not None
        self._pilot.run()

    def _end(self, number: int, _: Any) -> None:
        self._is_over = True
        assert self._pilot is not None
        self._pilot.stop(now=number == AT_ONCE)

    def _terminated(self, _: int, frame: Any) -> None:
        """Slurm has preempted the task, or somebody has cancelled it. One that ends while it is preempted counts as
        completed, and would not come back; one that is put back into the queue while it is cancelled would."""
        state = _state_of_this_task()
        log.info("task_terminated", worker=self._fleet.worker_name(self._index), slurm_state=state)
        if state == "RUNNING" and not self._is_over:
            requeue = signal.getsignal(REQUEUE)
            assert callable(requeue)
            requeue(REQUEUE, frame)
        else:
            self._end(DRAIN, None)


def _state_of_this_task() -> str:
    """Slurm's word; empty where Slurm does not answer."""
    command = ["squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%T"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("slurm_does_not_answer", reason=str(error))
        return ""
