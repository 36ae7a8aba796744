"""Trainers that are forked from a process which has torch and the trainer's modules already: importing them takes three
seconds of processor time, more than all that a test has a trainer do.

A trainer made so is a process like another: a child of its supervisor, leader of a session, with a pipe and a socket of
its own, and dead when it is killed. Its interpreter is not new: it shares the seed of its hashes with others, and its
environment in /proc is that of the process it comes from. A test for which that matters starts a fresh one.

Linux only.
"""

import ctypes
import gc
import json
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from subprocess import PIPE
from typing import Any, NoReturn

from nanomoe.processes import die_with_parent

_PR_SET_CHILD_SUBREAPER = 36
_LONGEST = 1 << 20
"""Bytes of a command and its environment."""


class WarmTrainers:
    """What starts trainers for this process, in place of the module `subprocess`.

    Made while this process has a single thread and no connection: a process that was forked beside other threads would
    find their locks held for good.
    """

    PIPE = PIPE

    def __init__(self) -> None:
        self._requests, its_requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        supervisor = os.getpid()
        if os.fork() == 0:
            _end_with(lambda: _serve(its_requests, supervisor))
        its_requests.close()

    def Popen(  # noqa: N802 - the name of what it stands for
        self, command: Sequence[str], *, stdin: int, env: Mapping[str, str], **_: Any
    ) -> "Started":
        """Have `python SCRIPT ARGUMENT ...` run by a new child of this process, in a session of its own, with a pipe
        for its stdout."""
        pipe, its_stdout = os.pipe()
        request = json.dumps({"arguments": list(command[1:]), "environment": dict(env)}).encode()
        # Whose parent has ended becomes the child of its next living ancestor that asks for it: of this process.
        _adopt_orphans(True)
        try:
            socket.send_fds(self._requests, [request], [stdin, its_stdout])
            os.close(its_stdout)
            pid = int(self._requests.recv(32))
        finally:
            _adopt_orphans(False)
        return Started(pid, pipe)


class Started:
    """As much of `subprocess.Popen` as a supervisor uses."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self.stdout = open(pipe, "rb", buffering=0)  # noqa: SIM115 - a descriptor; the reader closes it
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, 9)


def _serve(requests: socket.socket, supervisor: int) -> None:
    """Start trainers until the supervisor has ended."""
    die_with_parent(supervisor)
    os.closerange(3, requests.fileno())
    os.closerange(requests.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    gc.collect()
    gc.freeze()  # what is there now is shared with every trainer, as long as nobody writes to it
    while True:
        request, (stdin, stdout), _, _ = socket.recv_fds(requests, _LONGEST, 2)
        starter = os.fork()
        if starter == 0:
            me = os.getpid()
            if os.fork() != 0:
                os._exit(0)
            _end_with(lambda: _become(json.loads(request), stdin, stdout, requests, me, supervisor))  # noqa: B023
        os.waitpid(starter, 0)
        os.close(stdin)
        os.close(stdout)


def _become(
    request: dict[str, Any], stdin: int, stdout: int, requests: socket.socket, starter: int, supervisor: int
) -> None:
    """Run the script in this process, once it is the supervisor's child."""
    os.setsid()
    while (parent := os.getppid()) != supervisor:
        if parent != starter:
            return
        time.sleep(0.0005)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.environ.clear()
    os.environ.update(request["environment"])
    requests.send(str(os.getpid()).encode())
    os.closerange(3, max(stdin, stdout, requests.detach()) + 1)
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end_with(run: Any) -> NoReturn:
    """End this process when `run` has returned, with the status that Python would have."""
    status = 0
    try:
        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def _adopt_orphans(adopts: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
