"""The compiled loops of generation, prepared while continuations are generated without them.

Compiling takes eight seconds of a processor and holds the interpreter's lock most of the time, which every tensor
operation needs as well. So it happens in a process of its own, `python -m service.generation.compiled_loops`, of the
lowest priority; what it leaves on the disk is then loaded. No request waits for either.
"""

import os
import subprocess
import sys

import structlog

from nanomoe.processes import die_with_parent

log = structlog.get_logger(__name__)

_LOWEST_PRIORITY = 19
_LOGGED_CHARACTERS = 4000
"""Characters of the standard error of a compiler that failed, at most, that are logged."""


def prepare() -> bool:
    """Load every loop into this process, after compiling those that were never compiled for this processor.

    Returns whether they can be used; the reason is logged if not. Takes a second, or as long as the compiler needs.
    """
    from nanomoe.generation.kernels import compiling
    from nanomoe.generation.kernels.loading import load_all

    if not compiling.are_compiled():
        log.info("loops_compiling")
        # This thread must live until the compiler has ended: the compiler is killed when it ends.
        compiler = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "service.generation.compiled_loops", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if compiler.returncode != 0:
            log.error("loops_not_compiled", status=compiler.returncode, stderr=compiler.stderr[-_LOGGED_CHARACTERS:])
            return False
    log.info("loops_loaded", seconds=round(load_all(), 1))
    return True


def main() -> None:
    """Compile for the process whose id is the first argument."""
    os.nice(_LOWEST_PRIORITY)
    die_with_parent(int(sys.argv[1]))
    from nanomoe.generation.kernels.loading import load_all

    load_all()


if __name__ == "__main__":
    main()
