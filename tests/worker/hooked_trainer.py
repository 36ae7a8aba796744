"""The real trainer, which dies or fails at the points that a test names.

`python hooked_trainer.py HOOKS --parent PID --until TIME`, HOOKS being JSON: `{ATTEMPT: {"line": N}}` kills the process
before its Nth line, `{"point": "f1-50/renamed"}` at that point of the commit of a folder, `{"full": "f1-50/..."}` lets
the disk be full there, and `{"hold": "f1-50/..."}` goes on only when the trainer has been asked to stop.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nanomoe import checkpoint
from worker import trainer
from worker.guard import Supervision
from worker.protocol import Done, FromTrainer, Start

hooks: dict[str, dict[str, Any]] = json.loads(sys.argv.pop(1))
hook: dict[str, Any] = {}
said = 0
folder = ""
supervised: list[Supervision] = []

_run_job, _say, _write = trainer.run_job, trainer.Wire.say, checkpoint.write


def run_job(start: Start, wire: trainer.Wire, supervision: Supervision) -> Done:
    hook.update(hooks.get(str(start.fence), {}))
    supervised.append(supervision)
    return _run_job(start, wire, supervision)


def say(self: trainer.Wire, message: FromTrainer) -> None:
    global said
    if hook:
        said += 1
        if said == hook.get("line"):
            os.kill(os.getpid(), signal.SIGKILL)
    _say(self, message)


def write(target: Path, files: Any) -> Any:
    global folder
    folder = target.name
    return _write(target, files)


def reached(point: str) -> None:
    if hook.get("point") == f"{folder}/{point}":
        os.kill(os.getpid(), signal.SIGKILL)
    if hook.get("full") == f"{folder}/{point}":
        raise OSError(errno.ENOSPC, "No space left on device")
    if hook.get("hold") == f"{folder}/{point}":
        while supervised[0].stop is None:
            time.sleep(0.01)


trainer.run_job = run_job
trainer.Wire.say = say  # type: ignore[method-assign]
checkpoint.write = write
checkpoint.reached = reached

if __name__ == "__main__":
    trainer.main()
