"""What a task of a Slurm array job runs: the pilot of one worker, and what the signals of Slurm mean to it.

SIGUSR1 and SIGINT end the task for good, in order and at once; `workers down` sends them. The signal that Slurm sends
before the time limit, SIGUSR2, drains the worker and puts the task back into Slurm's queue, and so does SIGTERM where
the task is preempted.
"""

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Sequence

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


_TICK = 0.2
"""Seconds between two looks at what was received."""


class WorkerTask:
    """One worker of a fleet; submitit pickles it, and calls it on the host that Slurm has chosen."""

    def __init__(self, fleet: Fleet, index: int, command: Sequence[str] = WORKER) -> None:
        """`command` starts a worker."""
        self._fleet = fleet
        self._index = index
        self._command = command
        self._received: deque[int] = deque()
        self._is_over = False
        """Whether the task is to end for good."""
        self._is_requeued = False
        """Whether it goes back into Slurm's queue, if it is not over."""

    def __call__(self) -> PlacedWorker:
        """Keep the worker running until it was stopped, ended by itself or is refused; returns its last report."""
        configure_logging("json")
        fleet, index = self._fleet, self._index
        pilot = Pilot(
            fleet.worker_name(index),
            fleet.worker_arguments(index),
            fleet.worker_environment(index),
            command=self._command,
        )
        requeue = signal.getsignal(REQUEUE)
        assert callable(requeue), "submitit has set a handler"
        # A handler only takes down what came: it may have interrupted whoever holds a lock that the pilot needs.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        for number in (DRAIN, AT_ONCE, REQUEUE, signal.SIGTERM):
            signal.signal(number, lambda number, _: self._received.append(number))
        thread = threading.Thread(target=_keep_running, args=[pilot], name="pilot")
        thread.start()
        while thread.is_alive():
            self._handle_signals(pilot)
            thread.join(_TICK)
        self._handle_signals(pilot)
        if self._is_requeued and not self._is_over:
            requeue(REQUEUE, None)  # calls `checkpoint`, and ends the process
        return pilot.report()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts back into Slurm's queue."""
        return DelayedSubmission(WorkerTask(self._fleet, self._index, self._command))

    def _handle_signals(self, pilot: Pilot) -> None:
        while self._received:
            number = self._received.popleft()
            # Slurm has preempted the task, or somebody has cancelled it. One that ends while it is preempted counts as
            # completed, and would not come back; one that is put back into the queue while it is cancelled would.
            if number == REQUEUE or (number == signal.SIGTERM and _state_of_this_task() == "RUNNING"):
                self._is_requeued = True
            else:
                self._is_over = True
            log.info("task_signalled", signal=signal.Signals(number).name, is_over=self._is_over)
            pilot.stop(now=number == AT_ONCE)


def _keep_running(pilot: Pilot) -> None:
    # Some clusters signal every process of a task (proctrack/linuxproc), and these two would kill the worker, which has
    # no handler for them. Its processes inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {DRAIN, REQUEUE})
    pilot.run()


def _state_of_this_task() -> str:
    """Slurm's word; empty where Slurm does not answer."""
    command = ["squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%T"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("slurm_does_not_answer", reason=str(error))
        return ""
