"""`python -m worker` whose trainers follow a script instead of loading torch; options, signals and exit are the real
ones."""

import os
import sys
from pathlib import Path
from typing import Any

from worker import __main__ as program
from worker.compiler import STEP_PATH_VARIABLE
from worker.supervisor import Supervisor

TRAINER = Path(__file__).parents[2] / "worker" / "scripted_trainer.py"


def scripted(*arguments: Any, **options: Any) -> Supervisor:
    return Supervisor(*arguments, **options | {"command": (sys.executable, str(TRAINER), "work_fast")})


if __name__ == "__main__":
    os.environ[STEP_PATH_VARIABLE] = "eager"  # there is nothing to compile
    program.Supervisor = scripted  # type: ignore[misc, assignment]
    sys.exit(program.main())
