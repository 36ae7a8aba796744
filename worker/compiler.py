"""The compiled loops of training, made ready while jobs train without them.

Compiling takes half a minute of a processor, so it happens in a process of its own, of the lowest priority, which the
worker starts and waits for nowhere. A job that starts before it has ended does its steps without the loops, to its end.
"""

import os
import subprocess
import sys

import structlog

from nanomoe.logs import LogFormat, configure_logging
from nanomoe.processes import die_with_parent

log = structlog.get_logger(__name__)

STEP_PATH_VARIABLE = "NANOMOE_STEP_PATH"
"""The environment variable that tells every job how to do its steps: where it is set, nothing is chosen."""

_LOWEST_PRIORITY = 19


def start_compiler(log_format: LogFormat) -> subprocess.Popen[bytes]:
    """Start the process that compiles every loop of training which has not been compiled for this processor.

    The calling thread must stay: the compiler is killed when it ends.
    """
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "worker.compiler", str(os.getpid()), log_format],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the worker, which ends this process by ending
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def main() -> None:
    """Be the compiler of the process whose id is the first argument; the second is the format of the log."""
    os.nice(_LOWEST_PRIORITY)
    die_with_parent(int(sys.argv[1]))
    configure_logging("json" if sys.argv[2] == "json" else "console")
    from nanomoe.training.steps.loops.compiling import LOOPS

    if LOOPS.are_compiled():
        return
    log.info("training_loops_compiling")
    from nanomoe.training.steps.loading import load_all

    log.info("training_loops_compiled", seconds=round(load_all(), 1))


if __name__ == "__main__":
    main()
