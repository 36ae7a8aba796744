"""A Slurm cluster of one host for tests: the real daemons, on loopback, which end with the process of tests.

Debian's packages slurmctld, slurmd and slurm-client have them. The partition `low` is preempted by `high`.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from nanomoe.processes import die_with_parent

DAEMONS = ("slurmctld", "slurmd")

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
{signals}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""

SIGNALS = {
    "task": "ProctrackType=proctrack/pgid",
    "tree": "ProctrackType=proctrack/linuxproc\nSlurmctldParameters=preempt_send_user_signal",
}
"""How Slurm signals a task: its own process, as with proctrack/cgroup; or all that it has started too, where the notice
of a preemption has to be the signal that the task has asked for: a worker takes a second SIGTERM for `at once`."""


def slurm(*command: str) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def queued() -> dict[str, str]:
    """The state of every task that has not ended, by its id."""
    lines = slurm("squeue", "--noheader", "--array", "--format=%i|%T").splitlines()
    return dict(line.split("|") for line in lines)


@pytest.fixture(scope="module")
def slurm_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """A cluster, to which SLURM_CONF leads. The parameter: one of SIGNALS."""
    signals = SIGNALS[getattr(request, "param", "task")]
    found = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in (*DAEMONS, "sbatch")}
    if None in found.values():
        pytest.skip(f"not installed: {', '.join(name for name, path in found.items() if path is None)}")
    host = socket.gethostname().partition(".")[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        sockets = [stack.enter_context(socket.socket()) for _ in DAEMONS]
        for one in sockets:
            # Held until the end, so that nobody else takes a port; a daemon that sets the same option may listen on it.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        file = folder / "slurm.conf"
        given = {"host": host, "ports": ports, "user": getpass.getuser(), "folder": folder, "signals": signals}
        file.write_text(CONFIGURATION.format_map(given), "utf-8")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(file))
        logs = [folder / f"{name}.log" for name in DAEMONS]
        parent = os.getpid()
        daemons = []
        for name, log in zip(DAEMONS, logs, strict=True):
            options = ["-D", "-f", str(file), *(["-N", host] if name == "slurmd" else [])]
            daemon = subprocess.Popen(
                [str(found[name]), *options],
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: die_with_parent(parent),
            )
            daemons.append(daemon)
            stack.callback(_end, daemon)
        give_up = time.monotonic() + 120
        while "idle" not in subprocess.run(["sinfo", "--format=%T"], capture_output=True, text=True).stdout:
            is_starting = time.monotonic() < give_up and all(daemon.poll() is None for daemon in daemons)
            assert is_starting, "".join(log.read_text("utf-8") for log in logs)
            time.sleep(0.1)
        yield
        # The tasks' processes are children of slurmd's steps, and would outlive the daemons.
        subprocess.run(["scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}"], capture_output=True)
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], capture_output=True)
        give_up = time.monotonic() + 120
        while queued():
            assert time.monotonic() < give_up, queued()
            time.sleep(0.1)


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
