"""The real trainer, which dies or fails at the points that a test names.

`python hooked_trainer.py HOOKS --parent PID --until TIME`, HOOKS being JSON, `{ATTEMPT: HOOK}`. A point is one of the
commit of a folder, for example `f1-50/renamed`. A hook may have:

`"line": N`, to be killed before its Nth line; with `"starved": true` as the kernel does it for want of memory;
`"point": POINT`, to be killed there;
`"full": POINT`, to find the disk full there, and `"limit": POINT`, to find that the kernel takes no file any more;
`"hold": POINT`, to go on only when asked to stop, and `"wait": POINT`, when the file `go` is in the job's folder;
`"told first": NAME`, to tell of a folder, and to be killed, before it is written;
`"fits": N`, to let torch find no memory for more than N windows at once.
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nanomoe import checkpoint
from nanomoe.training.run import Run
from tests.worker.scripted_trainer import run_out_of_memory
from worker import trainer
from worker.guard import Supervision
from worker.protocol import CheckpointWritten, Done, FromTrainer, Start

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
    (job_folder / f"pid.{start.fence}").write_text(str(os.getpid()))
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
    if isinstance(message, CheckpointWritten) and message.folder == hook.get("told first"):
        os.kill(os.getpid(), signal.SIGKILL)


def write(target: Path, files: Any) -> Any:
    global folder
    folder = target.name
    if hook.get("told first") == folder:
        manifest, sha256 = _write(target, files)
        shutil.rmtree(target)
        return manifest, sha256
    return _write(target, files)


def reached(point: str) -> None:
    if hook.get("point") == f"{folder}/{point}":
        os.kill(os.getpid(), signal.SIGKILL)
    if hook.get("full") == f"{folder}/{point}":
        raise OSError(errno.ENOSPC, "No space left on device")
    if hook.get("limit") == f"{folder}/{point}":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
    if hook.get("wait") == f"{folder}/{point}":
        while not (job_folder / "go").exists():
            time.sleep(0.01)
    if hook.get("hold") == f"{folder}/{point}":
        while supervised[0].stop is None:
            time.sleep(0.01)


trainer._warm_up = lambda: None  # torch is imported by now, and a job of a test takes no longer than the warming
trainer.run_job = run_job
trainer.Wire.say = say  # type: ignore[method-assign]
checkpoint.write = write
checkpoint.reached = reached

if __name__ == "__main__":
    trainer.main()
