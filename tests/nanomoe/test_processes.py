"""A child process does not outlive the process that started it."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_CHILD = """
import sys, time
from nanomoe.processes import die_with_parent
die_with_parent(int(sys.argv[1]))
print("tied", flush=True)
time.sleep(60)
"""

_PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the parent-death signal")
def test_a_child_is_killed_when_its_parent_is() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, _CHILD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert select.select([child], [], [], 10)[0], "a pidfd is readable once its process has ended"
    finally:
        os.close(child)


def test_a_child_whose_parent_has_ended_already_exits_at_once() -> None:
    other = 1 if os.getpid() != 1 else 2
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(other)], cwd=ROOT, capture_output=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
