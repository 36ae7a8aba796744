"""A trainer under supervision, in real processes: when it ends, and when it does not."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.worker.scripted_trainer import SAFEGUARDS
from tests.worker.workplace import ended_within
from worker.protocol import Assignment, KeepAlive, Stop, encode

ROOT = Path(__file__).parents[2]
SUPERVISED = """
import os, sys, time
from nanomoe.processes import die_with_parent
from worker.supervision import Supervision
die_with_parent(int(sys.argv[1]))
from worker.protocol import Assignment
supervision = Supervision(time.monotonic() + float(sys.argv[2]))
print("supervised", flush=True)
while (stop := supervision.stop_of(Assignment("a", 1))) is None:
    time.sleep(0.005)
print(stop, sys.stdin.read(), flush=True)
os._exit(0)
"""


class Supervised(subprocess.Popen[bytes]):
    """A process under supervision, and this end of the socket that is its stdin."""

    def __init__(self, *, seconds: float = 60, stderr: int = subprocess.DEVNULL) -> None:
        self.socket, its_stdin = socket.socketpair()
        with its_stdin:
            super().__init__(
                [sys.executable, "-c", SUPERVISED, str(os.getpid()), str(seconds)],
                stdin=its_stdin.fileno(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                cwd=ROOT,
                bufsize=0,
            )
        assert self.stdout is not None
        assert self.stdout.readline() == b"supervised\n"

    def end(self) -> int:
        """Its exit status."""
        status = self.wait(20)
        self.socket.close()
        assert self.stdout is not None
        self.stdout.close()
        return status


def end(process: subprocess.Popen[bytes]) -> int:
    status = process.wait(20)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    return status


def test_a_trainer_ends_at_the_end_of_its_pipe() -> None:
    process = Supervised()
    process.socket.close()
    assert process.end() == -signal.SIGKILL


def test_a_trainer_without_a_keep_alive_ends_at_its_deadline() -> None:
    began = time.monotonic()
    process = Supervised(seconds=0.5)
    assert process.end() == -signal.SIGKILL
    assert time.monotonic() - began >= 0.5


def test_a_keep_alive_extends_the_deadline() -> None:
    process = Supervised(seconds=1)
    process.socket.sendall(encode(KeepAlive(until=time.monotonic() + 60)))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.socket.sendall(encode(Stop(assignment=Assignment("a", 1), reason="pause")))
    assert process.stdout is not None
    # What reads stdin beside the supervision finds it empty.
    assert process.stdout.readline() == b"pause \n"
    assert process.end() == 0


def test_a_trainer_that_was_stopped_reads_its_keep_alives_before_the_clock() -> None:
    process = Supervised(seconds=1)
    process.send_signal(signal.SIGSTOP)
    process.socket.sendall(encode(KeepAlive(until=time.monotonic() + 60)))
    time.sleep(1.2)  # its first deadline passes while it is stopped: the fault itself
    process.send_signal(signal.SIGCONT)
    process.socket.sendall(encode(Stop(assignment=Assignment("a", 1), reason="drain")))
    assert process.end() == 0


def test_a_line_that_is_no_message_ends_the_trainer_and_its_error_is_logged() -> None:
    process = Supervised(stderr=subprocess.PIPE)
    process.socket.sendall(b"hello\n")
    assert process.stderr is not None
    with process.stderr as stderr:
        logged = stderr.read().decode()
    assert process.end() == -signal.SIGKILL
    assert "ValidationError" in logged
    assert "supervisor_lost" not in logged


SUPERVISOR = """
import os, socket, subprocess, sys
own, its_stdin = socket.socketpair()
trainer = subprocess.Popen(
    [*sys.argv[1:], "--parent", str(os.getpid())], stdin=its_stdin, stdout=subprocess.PIPE, start_new_session=True
)
its_stdin.close()
trainer.stdout.readline()
print(trainer.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the parent-death signal")
@pytest.mark.parametrize("left", SAFEGUARDS)
def test_each_safeguard_alone_ends_the_trainer_of_a_killed_supervisor(left: str) -> None:
    trainer = [sys.executable, "-m", "tests.worker.scripted_trainer", "work", "--until", str(time.monotonic() + 5)]
    for taken in SAFEGUARDS:
        trainer += ["--without", taken] if taken != left else []
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *trainer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert supervisor.stdout is not None
    orphan = psutil.Process(int(supervisor.stdout.readline()))
    supervisor.kill()
    assert end(supervisor) == -signal.SIGKILL
    assert ended_within(30, orphan)
