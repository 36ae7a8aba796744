"""The real trainer, which dies or fails at the points that a test names.

`python hooked_trainer.py HOOKS --parent PID --until TIME`, HOOKS being JSON: `{ATTEMPT: {"line": N}}` kills the process
before its Nth line, `{"point": "f1-50/renamed"}` at that point of the commit of a folder, `{"full": "f1-50/..."}` lets
the disk be full there, and `{"hold": "f1-50/..."}` goes on only when the trainer has been asked to stop. With
`"starved": true` it is killed as the kernel does for want of memory; with `"fits": N` torch finds none for more than N
windows.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nanomoe import checkpoint
from nanomoe.run import Run
from tests.worker.scripted_trainer import run_out_of_memory
from worker import trainer
from worker.guard import Supervision
from worker.protocol import Done, FromTrainer, Start

hooks: dict[str, dict[str, Any]] = json.loads(sys.argv.pop(1))
hook: dict[str, Any] = {}
said = 0
folder = ""
job_folder = Path()
supervised: list[Supervision] = []

_run_job, _say, _write, _backward = trainer.run_job, trainer.Wire.say, checkpoint.write, Run._backward


def run_job(start: Start, wire: trainer.Wire, supervision: Supervision) -> Done:
    global job_folder
    hook.update(hooks.get(str(start.fence), {}))
    job_folder = Path(start.folder)
    if "fits" in hook:
        Run._backward = backward  # type: ignore[method-assign]
    supervised.append(supervision)
    return _run_job(start, wire, supervision)


def backward(self: Run, windows: list[int], *others: Any) -> Any:
    if len(windows) > hook["fits"]:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    return _backward(self, windows, *others)


def say(self: trainer.Wire, message: FromTrainer) -> None:
    global said
    if hook:
        said += 1
        if said == hook.get("line"):
            if hook.get("starved"):
                run_out_of_memory(job_folder)
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
