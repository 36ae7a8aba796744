"""The memory of a process's descendants."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.cli.bench.peak_memory import PeakMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

MIB = 2**20
CHILDREN = """
import os, sys
if os.fork() == 0:
    held = bytearray(b"1") * (64 << 20)
    if os.fork() == 0:
        {grandchild}
        print("ready", flush=True)
    sys.stdin.read()  # until the test closes it
    os._exit(0)
sys.stdin.read()
"""


@contextmanager
def descendants(grandchild: str) -> Iterator[int]:
    """A process whose child holds 64 MiB, and whose grandchild shares them."""
    command = [sys.executable, "-c", CHILDREN.format(grandchild=grandchild)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize(("grandchild", "mib"), [("pass", 64), ("held = bytearray(b'2') * (48 << 20)", 112)])
def test_what_a_fork_shares_counts_once_and_what_it_has_itself_counts_too(grandchild: str, mib: int) -> None:
    peak = PeakMemory()
    with descendants(grandchild) as ancestor, peak.watching(ancestor):
        pass
    assert peak.n_bytes is not None
    assert mib * MIB <= peak.n_bytes < (mib + 30) * MIB
    before = peak.n_bytes
    peak.look(ancestor)  # they have ended
    assert peak.n_bytes == before
