"""The real trainer, which dies or fails at the points that a test names.

`python hooked_trainer.py HOOKS --parent PID --until TIME`, HOOKS being JSON, `{"path": PATH, ATTEMPT: HOOK}`: how steps
are done, and a hook by attempt. A point is one of the
commit of a folder, for example `f1-50/renamed`. A hook may have:

`"line": N`, to be killed before its Nth line; with `"out of memory": true` as by the out-of-memory killer;
`"point": POINT`, to be killed there;
`"full": POINT`, to find the disk full there, and `"limit": POINT`, to find that the kernel takes no file any more;
`"hold": POINT`, to go on only when asked to stop, and `"wait": POINT`, when the file `go` is in the job's folder;
`"reported first": NAME`, to report a folder, and to be killed, before it is written;
`"fits": N`, to let torch find no memory for more than N windows at once;
`"evaluates": PERCENT`, to evaluate that checkpoint until asked to stop, when the file `evaluating` is in the folder.
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanomoe import checkpoint
from nanomoe.training.run import Run
from tests.worker.scripted_trainer import run_out_of_memory
from worker import trainer
from worker.protocol import CheckpointWritten, Done, FromTrainer, Start
from worker.supervision import Supervision

hooks: dict[str, dict[str, Any]] = json.loads(sys.argv.pop(1))
os.environ["NANOMOE_STEP_PATH"] = hooks.pop("path")  # type: ignore[assignment]
hook: dict[str, Any] = {}
n_sent = 0
folder = ""
job_folder = Path()
supervised: list[Supervision] = []

_run_job, _send, _write, _backward = trainer.run_job, trainer.Channel.send, checkpoint.write, Run._backward
_record = Run.record


def run_job(start: Start, channel: trainer.Channel, supervision: Supervision) -> Done:
    global job_folder, n_sent
    hook.clear()
    n_sent = 0
    hook.update(hooks.get(str(start.fence), {}))
    job_folder = Path(start.folder)
    (job_folder / f"pid.{start.fence}").write_text(str(os.getpid()))
    if "fits" in hook:
        Run._backward = backward  # type: ignore[method-assign]
    supervised[:] = [supervision]
    return _run_job(start, channel, supervision)


def backward(self: Run, windows: list[int], *others: Any) -> Any:
    if len(windows) > hook["fits"]:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    return _backward(self, windows, *others)


def record(self: Run, percent: int, *, raise_if_stopped: Callable[[], None], **options: Any) -> Any:
    if percent == hook.get("evaluates"):
        (job_folder / "evaluating").touch()
        while True:
            raise_if_stopped()
            time.sleep(0.01)
    return _record(self, percent, raise_if_stopped=raise_if_stopped, **options)


def send(self: trainer.Channel, message: FromTrainer) -> None:
    global n_sent
    if hook:
        n_sent += 1
        if n_sent == hook.get("line"):
            if hook.get("out of memory"):
                run_out_of_memory(job_folder)
            os.kill(os.getpid(), signal.SIGKILL)
    _send(self, message)
    if isinstance(message, CheckpointWritten) and message.folder == hook.get("reported first"):
        os.kill(os.getpid(), signal.SIGKILL)


def write(target: Path, files: Any) -> Any:
    global folder
    folder = target.name
    if hook.get("reported first") == folder:
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
Run.record = record  # type: ignore[method-assign]
trainer.Channel.send = send  # type: ignore[method-assign]
checkpoint.write = write
checkpoint.reached = reached

if __name__ == "__main__":
    trainer.main()
