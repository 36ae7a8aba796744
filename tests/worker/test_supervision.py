"""A trainer under supervision, in real processes: when it ends, and when it does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.worker.scripted_trainer import SAFEGUARDS
from tests.worker.workplace import ended_within
from worker.protocol import KeepAlive, Stop, encode

ROOT = Path(__file__).parents[2]
SUPERVISED = """
import os, sys, time
from nanomoe.processes import die_with_parent
from worker.supervision import Supervision
die_with_parent(int(sys.argv[1]))
supervision = Supervision(time.monotonic() + float(sys.argv[2]))
print("supervised", flush=True)
while supervision.stop is None:
    time.sleep(0.005)
print(supervision.stop, sys.stdin.read(), flush=True)
os._exit(0)
"""


def supervised(*, seconds: float = 60, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    arguments = [str(os.getpid()), str(seconds)]
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISED, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
        cwd=ROOT,
        bufsize=0,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"supervised\n"
    return process


def end(process: subprocess.Popen[bytes]) -> int:
    status = process.wait(20)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    return status


def test_a_trainer_ends_at_the_end_of_its_pipe() -> None:
    process = supervised()
    assert process.stdin is not None
    process.stdin.close()
    assert end(process) == -signal.SIGKILL


def test_a_trainer_without_a_keep_alive_ends_at_its_deadline() -> None:
    began = time.monotonic()
    process = supervised(seconds=0.5)
    assert end(process) == -signal.SIGKILL
    assert time.monotonic() - began >= 0.5


def test_a_keep_alive_extends_the_deadline() -> None:
    process = supervised(seconds=1)
    assert process.stdin is not None
    process.stdin.write(encode(KeepAlive(until=time.monotonic() + 60)))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.stdin.write(encode(Stop(reason="pause")))
    assert process.stdout is not None
    # What reads stdin beside the supervision finds it empty.
    assert process.stdout.readline() == b"pause \n"
    assert end(process) == 0


def test_a_trainer_that_was_stopped_reads_its_keep_alives_before_the_clock() -> None:
    process = supervised(seconds=1)
    process.send_signal(signal.SIGSTOP)
    assert process.stdin is not None
    process.stdin.write(encode(KeepAlive(until=time.monotonic() + 60)))
    time.sleep(1.2)  # its first deadline passes while it is stopped: the fault itself
    process.send_signal(signal.SIGCONT)
    process.stdin.write(encode(Stop(reason="drain")))
    assert end(process) == 0


def test_a_line_that_is_no_message_ends_the_trainer_and_its_error_is_logged() -> None:
    process = supervised(stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"hello\n")
    assert process.stderr is not None
    with process.stderr as stderr:
        logged = stderr.read().decode()
    assert end(process) == -signal.SIGKILL
    assert "ValidationError" in logged
    assert "supervisor_lost" not in logged


SUPERVISOR = """
import os, subprocess, sys
trainer = subprocess.Popen(
    [*sys.argv[1:], "--parent", str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
)
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
