"""A trainer without a model: it has the real supervision and follows a script, for tests of the worker.

`python scripted_trainer.py SCRIPT --parent PID --until TIME`. What a script does may depend on the attempt, which is
the fence of the start message. Like a real trainer it takes the next job when one has ended without a failure. With
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
    encode_from_trainer,
    parse_to_trainer,
)
from worker.supervision import Supervision

TOTAL = 100


class Script:
    """The start message, and the messages that a real trainer would send."""

    def __init__(self, supervision: Supervision, start: Start) -> None:
        self.supervision = supervision
        self.start = start
        self.folder = Path(start.folder)
        self.step = 0
        if self.start.resume is not None:
            self.step = int(
                checkpoint.open(Path(self.start.resume.folder), self.start.resume.manifest_sha256).read_all()["step"]
            )
        self.write_file("pid", str(os.getpid()))

    @property
    def attempt(self) -> int:
        return self.start.fence

    @property
    def execution(self) -> dict[str, Any]:
        return self.start.execution or {"device": "cpu", "micro_batch": self.start.config.batch_size}

    def prepared(self) -> None:
        send(
            Prepared(
                execution=self.execution,
                n_tokens=10,
                total_steps=TOTAL,
                n_params=1,
                n_active_params=1,
                resumed_at_step=self.step if self.start.resume else None,
                warnings=[],
            )
        )

    def steps(self, n: int) -> None:
        first, self.step = self.step + 1, self.step + n
        figures = [float(step) for step in range(first, self.step + 1)]
        send(
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
        send(
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
        send(SnapshotWritten(step=self.step, folder=name, manifest_sha256=sha256))

    def write_file(self, name: str, content: str) -> None:
        """A file for the test, whole as soon as it is there."""
        unfinished = self.folder / f"{name}.{os.getpid()}"
        unfinished.write_text(content)
        unfinished.replace(self.folder / f"{name}.{self.attempt}")

    def work_until_stopped(self) -> None:
        """One step every 10 ms, until the supervisor says stop or the test leaves the file `finish`."""
        while self.supervision.stop is None and not (self.folder / "finish").exists():
            self.steps(1)
            time.sleep(0.01)

    def work(self) -> NoReturn:
        """As a real trainer does: all of the job, or what is asked for."""
        self.prepared()
        self.checkpoint(0)
        self.work_until_stopped()
        if self.supervision.stop is not None:
            if self.supervision.stop != "cancel":
                self.snapshot()
            end("stopped")
        self.step = TOTAL - 1
        self.steps(1)
        self.checkpoint(100)
        end("succeeded")


class JobEnded(BaseException):
    """Nothing of the job is left."""


assignment: Assignment | None = None
"""The attempt that messages are about."""


def send(message: FromTrainer) -> None:
    os.write(1, encode_from_trainer(message, assignment))


def end(outcome: Any, code: str | None = None) -> NoReturn:
    send(Done(outcome=outcome, error=Failure(code=code, message=f"because of {code}") if code else None))
    if outcome == "failed":
        os._exit(0)
    raise JobEnded


def work(script: Script) -> None:
    script.work()


def succeed(script: Script) -> None:
    """A job of no time at all."""
    (script.folder / "finish").touch()
    script.work()


def succeed_early(script: Script) -> None:
    script.prepared()
    script.steps(42)
    script.checkpoint(100, stopped_early=True, perplexity=1.9872)
    end("succeeded")


def fail(script: Script) -> None:
    script.prepared()
    end("failed", "loss_not_finite")


def disk_full(script: Script) -> None:
    script.prepared()
    end("failed", "disk_full")


def storage_failed(script: Script) -> None:
    """The data folder is away, at the first four attempts: more than a job may crash."""
    if script.attempt <= 4:
        end("failed", "storage_failed")
    script.work()


def hung_up(script: Script) -> None:
    """Is asked to end by a signal that no supervisor sends, at the first four attempts."""
    if script.attempt <= 4:
        script.prepared()
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
    end("succeeded")


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
    global assignment
    script.prepared()
    assignment = Assignment("f" * 32, script.attempt)
    script.steps(1)
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
        *(storage_failed, hung_up, leave_a_child, confuse_jobs, idle_too_soon),
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
    parser.add_argument("--without", choices=SAFEGUARDS, action="append", default=[])
    options = parser.parse_args()
    supervision = start_supervision(options.parent, options.until, options.without)
    signal.signal(signal.SIGTERM, lambda *_: supervision.terminated())
    signal.signal(signal.SIGUSR1, lambda *_: None)
    send(Ready())
    while (assigned := supervision.wait_for_start()) is not None:
        start, lock = assigned
        assignment = start.assignment
        try:
            SCRIPTS[options.script](Script(supervision, start))
        except JobEnded:
            os.close(lock)
            send(Idle())
