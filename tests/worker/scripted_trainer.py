"""A trainer without a model: it has the real supervision and follows a script, for tests of the worker.

`python scripted_trainer.py SCRIPT --parent PID --until TIME`. What a script does may depend on the attempt, which is
the fence of the start message. Like a real trainer it takes the next job when one has ended without a failure, and
several together, each with a thread of its own; a script may depend on the `seed` of a job's config. With
`--without SAFEGUARD` one of the three safeguards is taken away. Files in the job's folder are how a test and a script
wait for each other.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from nanomoe import checkpoint
from nanomoe.evaluation.metrics import CheckpointMetrics
from nanomoe.processes import die_with_parent
from worker.memory import oom_kills
from worker.protocol import (
    Assignment,
    CheckpointWritten,
    Done,
    Failure,
    FromTrainer,
    Idle,
    KeepAlive,
    Prepared,
    Ready,
    SnapshotWritten,
    Start,
    Steps,
    StopReason,
    Warned,
    encode_from_trainer,
    parse_to_trainer,
)
from worker.supervision import Supervision

TOTAL = 100


class Script:
    """The start message, and the messages that a real trainer would send."""

    total = TOTAL
    """Steps of the job."""

    def __init__(self, supervision: Supervision, start: Start, n_jobs: int = 1) -> None:
        """`n_jobs`: how many the trainer was given together."""
        self.supervision = supervision
        self.start = start
        self.n_jobs = n_jobs
        self.folder = Path(start.folder)
        self.step = 0
        if self.start.resume is not None:
            self.step = int(
                checkpoint.open(Path(self.start.resume.folder), self.start.resume.manifest_sha256).read_all()["step"]
            )
        self.write_file("pid", str(os.getpid()))

    def send(self, message: FromTrainer) -> None:
        send(message, self.start.assignment)

    @property
    def stop(self) -> StopReason | None:
        return self.supervision.stop_of(self.start.assignment)

    def end(self, outcome: Any, code: str | None = None) -> NoReturn:
        self.send(Done(outcome=outcome, error=Failure(code=code, message=f"because of {code}") if code else None))
        raise JobFailed if outcome == "failed" else JobEnded

    @property
    def attempt(self) -> int:
        return self.start.fence

    @property
    def execution(self) -> dict[str, Any]:
        return self.start.execution or {"device": "cpu", "n_threads": 1, "micro_batch": self.start.config.batch_size}

    def prepared(self) -> None:
        self.send(
            Prepared(
                execution=self.execution,
                n_tokens=10,
                total_steps=self.total,
                n_params=1,
                n_active_params=1,
                resumed_at_step=self.step if self.start.resume else None,
                warnings=[],
            )
        )

    def steps(self, n: int) -> None:
        first, self.step = self.step + 1, self.step + n
        figures = [float(step) for step in range(first, self.step + 1)]
        self.send(
            Steps(
                step=list(range(first, self.step + 1)),
                train_loss=figures,
                lr=figures,
                grad_norm=figures,
                tok_per_sec=10.0,
                epoch=self.step,
            )
        )

    def checkpoint(self, percent: int, **figures: Any) -> None:
        name = f"f{self.start.fence}-{percent}"
        manifest, sha256 = checkpoint.write(self.folder / name, {"step": str(self.step).encode()})
        self.send(
            CheckpointWritten(
                folder=name,
                manifest_sha256=sha256,
                files=manifest.files,
                metrics=CheckpointMetrics.model_validate(
                    {
                        "percent": percent,
                        "step": self.step,
                        "epoch": self.step,
                        "loss": 1.0,
                        "perplexity": 2.72,
                        "bits_per_byte": 1.44,
                        "accuracy": 0.5,
                    }
                    | figures
                ),
                tok_per_sec=10.0,
            )
        )

    def snapshot(self) -> None:
        name = f"f{self.start.fence}-s{self.step}"
        _, sha256 = checkpoint.write(self.folder / name, {"step": str(self.step).encode()})
        self.send(SnapshotWritten(step=self.step, folder=name, manifest_sha256=sha256))

    def write_file(self, name: str, content: str) -> None:
        """A file for the test, whole as soon as it is there."""
        unfinished = self.folder / f"{name}.{os.getpid()}"
        unfinished.write_text(content)
        unfinished.replace(self.folder / f"{name}.{self.attempt}")

    def work_until_stopped(self, steps: int) -> None:
        """One step every 10 ms, until the supervisor says stop or the test leaves the file `finish`."""
        while self.stop is None and not (self.folder / "finish").exists():
            self.steps(steps)
            time.sleep(0.01 * steps)

    def work(self, steps: int = 1) -> NoReturn:
        """As a real trainer does: all of the job, or what is asked for. Each message about steps is about so many."""
        self.prepared()
        self.checkpoint(0)
        self.work_until_stopped(steps)
        if (stop := self.stop) is not None:
            if stop != "cancel":
                self.snapshot()
            self.end("stopped")
        self.step = self.total - 1
        self.steps(1)
        self.checkpoint(100)
        self.end("succeeded")


class JobEnded(BaseException):
    """Nothing of the job is left."""


class JobFailed(BaseException):
    """The trainer ends when its other jobs have ended."""


def send(message: FromTrainer, assignment: Assignment | None = None) -> None:
    os.write(1, encode_from_trainer(message, assignment))


def work(script: Script) -> None:
    script.work()


def work_long(script: Script) -> None:
    """As `work`, but of a job of which as good as all is left, whatever has been done: others of its kind are claimed
    with it."""
    script.total = 1_000_000
    script.work()


def work_fast(script: Script) -> None:
    """As a real trainer reports them: the steps of a quarter of a second in one message."""
    script.work(steps=25)


def succeed(script: Script) -> None:
    """A job of no time at all."""
    (script.folder / "finish").touch()
    script.work()


def succeed_early(script: Script) -> None:
    script.prepared()
    script.steps(42)
    script.checkpoint(100, stopped_early=True, perplexity=1.9872)
    script.end("succeeded")


def fail(script: Script) -> None:
    script.prepared()
    script.end("failed", "loss_not_finite")


def fail_second(script: Script) -> None:
    """The job with seed 2 fails, and works in all else."""
    if script.start.config.seed == 2:
        fail(script)
    script.work()


def never_stop_second(script: Script) -> None:
    """The job with seed 2 does not stop when it is asked to, at the first attempt."""
    if script.start.config.seed == 2 and script.attempt == 1:
        script.prepared()
        while True:
            script.steps(1)
            time.sleep(0.01)
    script.work()


def die_with_third(script: Script) -> None:
    """The trainer dies at every attempt at the job with seed 3, once its jobs have steps past a snapshot."""
    if script.attempt > 1 and script.start.config.seed != 3:
        script.work()
    script.prepared()
    script.steps(5)
    script.snapshot()
    script.steps(2)
    script.write_file("ready", "")
    if script.start.config.seed == 3:
        waits_for = script.n_jobs
        while len(list(script.folder.parent.glob("*/ready.1"))) < waits_for:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def out_of_memory_in_company(script: Script) -> None:
    """Is killed by the out-of-memory killer with more than two jobs at once."""
    if script.n_jobs > 2:
        script.prepared()
        if script.start.config.seed == 1:
            run_out_of_memory(script.folder)
        time.sleep(60)
    script.work()


def disk_full(script: Script) -> None:
    script.prepared()
    script.end("failed", "disk_full")


def storage_failed(script: Script) -> None:
    """The data folder is away, at the first four attempts: more than a job may crash."""
    if script.attempt <= 4:
        script.end("failed", "storage_failed")
    script.work()


def hung_up(script: Script) -> None:
    """Is asked to end by a signal that no supervisor sends, at the first four attempts."""
    if script.attempt <= 4:
        script.prepared()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a suite that runs under nohup has its children ignore
        os.kill(os.getpid(), signal.SIGHUP)
    script.work()


def unstoppable(script: Script) -> None:
    """Ignores every signal and message; its child does too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    unstoppable_child(script)
    script.prepared()
    while True:
        script.steps(1)
        time.sleep(0.01)


def die(script: Script) -> None:
    """Dies at every attempt before there is anything to resume from."""
    script.prepared()
    script.steps(3)
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(script: Script) -> None:
    """Dies at the first attempt, some steps past its snapshot."""
    if script.attempt == 1:
        script.prepared()
        script.checkpoint(0)
        script.steps(5)
        script.snapshot()
        script.steps(7)
        os.kill(os.getpid(), signal.SIGSEGV)
    script.work()


def out_of_memory(script: Script) -> None:
    """Is killed by the out-of-memory killer at some step, as long as it computes more than two windows together."""
    if script.execution["micro_batch"] > 2:
        script.prepared()
        script.steps(3)
        run_out_of_memory(script.folder)
    script.work()


def out_of_memory_always(script: Script) -> None:
    script.prepared()
    run_out_of_memory(script.folder)


def out_of_memory_at_the_start(script: Script) -> None:
    run_out_of_memory(script.folder)


def run_out_of_memory(folder: Path) -> NoReturn:
    """Die as by the kernel's out-of-memory killer. `folder` is the job's."""
    events = folder.parent.parent / "memory.events"
    before = oom_kills(events)
    events.write_text(f"oom_kill {before + 1}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


def stalled(script: Script) -> None:
    """A step that never ends, at the first attempt."""
    if script.attempt == 1:
        script.prepared()
        script.steps(1)
        while True:
            time.sleep(60)
    script.work()


def slow_steps(script: Script) -> None:
    """Some slow steps, and then one ten times as slow."""
    script.prepared()
    for seconds in (0.2, 0.2, 0.2, 2.0):
        time.sleep(seconds)
        script.steps(1)
    script.end("succeeded")


def protocol_error(script: Script) -> None:
    os.write(1, b"not the protocol\n")
    time.sleep(60)


def orphans(script: Script) -> None:
    """Leaves grandchildren behind that its death does not reach: one in its group, one in a session of its own."""
    if script.attempt == 1:
        script.prepared()
        unstoppable_child(script)
        unstoppable_child(script, start_new_session=True, close_fds=False)
        os.kill(os.getpid(), signal.SIGKILL)
    script.work()


def leave_a_child(script: Script) -> None:
    """Leaves a process behind, in a session of its own, that has all open files of its parent; the first time only."""
    if not list(script.folder.parent.glob("*/children")):
        unstoppable_child(script, start_new_session=True, close_fds=False)
    succeed(script)


def confuse_jobs(script: Script) -> None:
    """Sends a message about a job that it does not have."""
    script.prepared()
    send(Warned(code="confused", message="whose?"), Assignment("f" * 32, script.attempt))
    time.sleep(60)


def idle_too_soon(script: Script) -> None:
    """Says that nothing of the job is left, and never how it ended."""
    script.prepared()
    raise JobEnded


def unstoppable_child(script: Script, **options: Any) -> None:
    """A process that only SIGKILL ends, and holds what it inherited."""
    code = "import signal,sys,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, **options)
    assert child.stdout is not None
    child.stdout.readline()
    with (script.folder / "children").open("a") as file:
        file.write(f"{child.pid}\n")


SCRIPTS: dict[str, Callable[[Script], None]] = {
    script.__name__: script
    for script in (
        *(
            work,
            work_fast,
            succeed,
            succeed_early,
            fail,
            disk_full,
            unstoppable,
            die,
            die_once,
            stalled,
            slow_steps,
            protocol_error,
            orphans,
        ),
        *(storage_failed, hung_up, leave_a_child, confuse_jobs, idle_too_soon, work_long),
        *(fail_second, never_stop_second, die_with_third, out_of_memory_in_company),
        *(out_of_memory, out_of_memory_always, out_of_memory_at_the_start),
    )
}

SAFEGUARDS = ("signal", "pipe", "deadline")


class WithoutDeadline(Supervision):
    """Supervision that ignores the deadlines of keep-alives."""

    def __init__(self, until: float) -> None:
        super().__init__(until + 3600)

    def _handle(self, line: bytes) -> None:
        if not isinstance(parse_to_trainer(line), KeepAlive):
            super()._handle(line)


Sockets = tuple[socket.socket, socket.socket]


def stdin_without_end() -> Sockets:
    """Put a socket in stdin's place that never ends; what stdin was, and what writes to the new one."""
    real, (mine, writer) = socket.socket(fileno=os.dup(0)), socket.socketpair()
    os.dup2(mine.detach(), 0)
    return real, writer


def forward_for_ever(sockets: Sockets) -> None:
    """Pass on messages and open files, and not the end."""
    real, writer = sockets
    while True:
        content, descriptors, _, _ = socket.recv_fds(real, 1 << 16, 1)
        if not content:
            threading.Event().wait()
        socket.send_fds(writer, [content], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def run_all(work: Callable[[Script], None], scripts: Sequence[Script]) -> bool:
    """Follow the script for each job; whether one has failed."""

    def run(script: Script) -> bool:
        try:
            work(script)
        except JobEnded:
            return False
        except JobFailed:
            return True
        raise AssertionError("a script ends its job")

    if len(scripts) == 1:
        return run(scripts[0])
    with ThreadPoolExecutor(len(scripts)) as pool:
        return any(list(pool.map(run, scripts)))


def start_supervision(parent: int, until: float, without: Sequence[str]) -> Supervision:
    """The real trainer's safeguards but those in `without`."""
    if "signal" not in without:
        die_with_parent(parent)
    if "pipe" in without:
        threading.Thread(target=forward_for_ever, args=[stdin_without_end()], daemon=True).start()
    return (WithoutDeadline if "deadline" in without else Supervision)(until)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--measure-cohort", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--without", choices=SAFEGUARDS, action="append", default=[])
    options = parser.parse_args()
    supervision = start_supervision(options.parent, options.until, options.without)
    signal.signal(signal.SIGTERM, lambda *_: supervision.terminated())
    signal.signal(signal.SIGUSR1, lambda *_: None)
    send(Ready(cohort=3 if options.measure_cohort else None))
    while (assigned := supervision.wait_for_jobs()) is not None:
        starts, lock = assigned
        if run_all(SCRIPTS[options.script], [Script(supervision, start, len(starts)) for start in starts]):
            os._exit(0)
        os.close(lock)
        send(Idle())
    if supervision.should_exit:
        # As the real trainer does, so that a job that was just sent counts no crash.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
