"""The compiled loops of generation, made ready while texts are generated without them.

Compiling takes eight seconds of a processor and holds the interpreter's lock most of the time, which every tensor
operation needs as well. So it happens in a process of its own, `python -m service.generation.compiled_loops`, of the
lowest priority; what it leaves on the disk is then loaded. Nobody waits for either.
"""

import os
import subprocess
import sys

import structlog

from nanomoe.processes import die_with_parent

log = structlog.get_logger(__name__)

_LOWEST_PRIORITY = 19
_TOLD = 4000
"""Characters of what the compiler's process said before it failed that are logged."""


def prepare() -> bool:
    """Load every loop into this process, after having them compiled if they never were for this processor.

    Returns whether they can be used; why not is logged. Takes a second, or as long as the compiler needs.
    """
    from nanomoe.generation.kernels import compiling
    from nanomoe.generation.kernels.loading import load_all

    if not compiling.are_compiled():
        log.info("loops_compiling")
        # The thread that waits here must stay: the compiler dies with it.
        compiler = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "service.generation.compiled_loops", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if compiler.returncode != 0:
            log.error("loops_not_compiled", status=compiler.returncode, stderr=compiler.stderr[-_TOLD:])
            return False
    log.info("loops_loaded", seconds=round(load_all(), 1))
    return True


def main() -> None:
    """Be the compiler of the process whose id is the first argument."""
    os.nice(_LOWEST_PRIORITY)
    die_with_parent(int(sys.argv[1]))
    from nanomoe.generation.kernels.loading import load_all

    load_all()


if __name__ == "__main__":
    main()
