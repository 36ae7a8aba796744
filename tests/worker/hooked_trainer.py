"""The real trainer, which dies or fails at the points that a test names.

`python hooked_trainer.py HOOKS --parent PID --until TIME`, HOOKS being JSON, `{"path": PATH, ATTEMPT: HOOK}`: how steps
are done, `stacked` on a stand-in for CUDA graphs; how long a bucket is asked again, if it has `"retries"`; and a hook
by attempt. With `"deaths": {"trainer": FILE, "fork": FILE}` it dies where the first file orders it (`next_death.py`);
with the second a cohort is trained by two forks, of which one dies where that orders it. A point is one of the commit
of a folder, for example `f1-50/renamed`. A hook may have:

`"line": N`, to be killed before its Nth line; with `"out of memory": true` as by the out-of-memory killer;
`"point": POINT`, to be killed there;
`"full": POINT`, to find the disk full there, and `"limit": POINT`, to find that the kernel takes no file any more;
`"hold": POINT`, to go on only when asked to stop, and `"wait": POINT`, when the file `go` is in the job's folder;
`"reported first": NAME`, to report a folder, and to be killed, before it is written;
`"fits": N`, to let torch find no memory for more than N windows at once;
`"forks": N`, to train a cohort with as many processes as if there were N cores;
`"step by step": true`, to train the members of a cohort in turns of a step;
`"evaluates": PERCENT`, to evaluate that checkpoint until asked to stop, when the file `evaluating` is in the folder.
"""

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanomoe import checkpoint
from nanomoe.store import commit
from nanomoe.store.opening import open_store
from nanomoe.store.store import Store
from nanomoe.training import cohort
from nanomoe.training.cohort import Left
from nanomoe.training.loop import Happened
from nanomoe.training.run import Run
from nanomoe.training.steps.choice import CAPTURING
from nanomoe.training.steps.kept import KeptSteps
from tests.faults.next_death import NextDeath
from tests.nanomoe.training.steps.graphs_stand_in import RecordedGraphs
from tests.worker.scripted_trainer import run_out_of_memory
from worker import cohort_trainer, job_trainer, trainer
from worker.channel import Channel, JobChannel
from worker.protocol import AboutJob, CheckpointWritten, Done, Start, StopReason
from worker.supervision import Supervision

hooks: dict[str, dict[str, Any]] = json.loads(sys.argv.pop(1))
path: str = hooks.pop("path")  # type: ignore[assignment]
if path == "stacked":
    CAPTURING["cpu"] = RecordedGraphs
retry_seconds = hooks.pop("retries", None)
os.environ["NANOMOE_STEP_PATH"] = "captured" if path == "stacked" else path  # of a job that has no company
deaths = {who: NextDeath(Path(file)) for who, file in hooks.pop("deaths", {}).items()}
hook: dict[str, Any] = {}
n_sent = 0
folder = ""
job_folder = Path()
supervised: list[Callable[[], StopReason | None]] = []

_run_job, _run_cohort, _send = trainer.run_job, trainer.run_cohort, JobChannel.send
_write, _backward = checkpoint.write, Run._backward
_record, _sendable = Run.record, cohort._sendable


def run_job(start: Start, channel: JobChannel, supervision: Supervision, kept_steps: KeptSteps) -> Done:
    hook_up([start], supervision)
    return _run_job(start, channel, supervision, kept_steps)


def run_cohort(starts: Sequence[Start], channel: Channel, supervision: Supervision) -> bool:
    """The hook is that of the first member's attempt; lines are counted over all members."""
    hook_up(starts, supervision)
    if "forks" in hook or "fork" in deaths:
        torch.set_num_threads(hook.get("forks", 2))
    cohort._ROUND_SECONDS = 0.0 if hook.get("step by step") else 0.5
    return _run_cohort(starts, channel, supervision)


def die_if_ordered(who: str) -> None:
    if who in deaths:
        deaths[who].line()


def sendable(happened: Happened | Left) -> Happened | Left:
    die_if_ordered("fork")
    return _sendable(happened)


def hook_up(starts: Sequence[Start], supervision: Supervision) -> None:
    global job_folder, n_sent
    start = starts[0]
    hook.clear()
    n_sent = 0
    hook.update(hooks.get(str(start.fence), {}))
    job_folder = Path(start.text_path).parent
    for each in starts:
        unfinished = Path(each.text_path).parent / f"unfinished.{each.fence}"
        unfinished.write_text(str(os.getpid()))
        unfinished.rename(unfinished.with_name(f"pid.{each.fence}"))
    if "fits" in hook:
        Run._backward = backward  # type: ignore[method-assign]
    supervised[:] = [lambda: supervision.stop_of(start.assignment)]


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


def send(self: JobChannel, message: AboutJob) -> None:
    global n_sent
    die_if_ordered("trainer")
    if hook:
        n_sent += 1
        if n_sent == hook.get("line"):
            if hook.get("out of memory"):
                run_out_of_memory(job_folder)
            os.kill(os.getpid(), signal.SIGKILL)
    _send(self, message)
    if isinstance(message, CheckpointWritten) and message.folder == hook.get("reported first"):
        os.kill(os.getpid(), signal.SIGKILL)


def write(target: Store, files: Any) -> Any:
    global folder
    folder = target.name
    if hook.get("reported first") == folder:
        manifest, sha256 = _write(target, files)
        target.remove()
        return manifest, sha256
    return _write(target, files)


def reached(point: str) -> None:
    die_if_ordered("trainer")
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
        while supervised[0]() is None:
            time.sleep(0.01)


trainer._warm_up = lambda **_: None  # torch is imported by now, and a job of a test takes no longer than the warming
trainer.run_job = run_job
trainer.run_cohort = run_cohort
Run.record = record  # type: ignore[method-assign]
JobChannel.send = send  # type: ignore[method-assign]
cohort._sendable = sendable
checkpoint.write = write
commit.reached = reached
if retry_seconds is not None:
    for module in (job_trainer, cohort_trainer):
        module.open_store = partial(open_store, retry_seconds=retry_seconds)

if __name__ == "__main__":
    trainer.main()
