"""Hosts that a network can lose, on one machine: network, process and name of each are namespaces of its own.

    host `a` ---- database ----+
             ---- store -------+-- the servers' network, with the other end of each cable
    host `b` ---- database ----+
             ---- store -------+

A cable that is cut drops what is sent into it, both ways, and says nothing, as a switch does that has failed: nobody is
told that a connection is gone. All of it is reached by descriptors and processes of the test, and goes with them,
however they end. Linux, as root, with `ip` of iproute2.
"""

import ctypes
import os
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import psutil

Cable = Literal["database", "store"]
CABLES: tuple[Cable, ...] = ("database", "store")

_RANGE = "198.18"
"""First half of all addresses: RFC 2544 keeps them for tests of networks, and none leaves the namespaces."""

_CLONE_NEWNET = 0x40000000
_KINDS = ("net", "uts", "mnt", "pid")
_UNSHARE = ("unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child")


def what_is_missing() -> str | None:
    """What this machine lacks to make hosts, in words; None where they can be made."""
    if sys.platform != "linux":
        return "Linux"
    if shutil.which("ip", path=_path()) is None:
        return "the command `ip` (of iproute2)"
    made = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True)
    return f"the right to make namespaces ({made.stderr.strip()})" if made.returncode else None


class Network:
    """The network that the servers are in, and that every cable leads to."""

    def __init__(self) -> None:
        def make() -> int:
            _call("unshare", _CLONE_NEWNET)
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

        with ThreadPoolExecutor(1) as pool:  # the thread goes with the namespace that it is in
            self._descriptor = pool.submit(make).result()
        self._n_cables = 0

    def close(self) -> None:
        os.close(self._descriptor)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in the network within the block, and so is what it starts and what it listens with."""
        with _entered(self._descriptor):
            yield

    @contextmanager
    def host(self, name: str) -> Iterator["Host"]:
        """A new host with both cables, which is lost at the end of the block."""
        found = Host(name, self)
        try:
            yield found
        finally:
            found.die()

    def lay(self, host: "Host", cable: Cable) -> str:
        """Lay a cable to a host; the address of its end here."""
        here, name = f"{_RANGE}.{self._n_cables}", f"c{self._n_cables}"
        mac = f"02:00:00:00:00:{self._n_cables:02x}"
        self._n_cables += 1
        self.ip(
            f"link add {name} address {mac} type veth peer name {cable} netns {host.init}",
            f"address add {here}.1/30 dev {name}",
            f"link set {name} up",
        )
        with host.entered():
            _ip(
                f"address add {here}.2/30 dev {cable}",
                f"link set {cable} up",
                # Not asked for over the cable: that nobody answers would tell that it is cut.
                f"neighbour add {here}.1 lladdr {mac} dev {cable} nud permanent",
            )
        host.ends[cable] = name
        return f"{here}.1"

    def ip(self, *commands: str) -> None:
        """Commands of `ip`, carried out in the network."""
        with self.entered():
            _ip(*commands)

    @contextmanager
    def forwarding(self, to: str) -> Iterator[int]:
        """A port of the network whose connections are passed on to an address outside of it, `HOST:PORT`."""
        host, _, port = to.rpartition(":")
        with self.entered():
            server = _Forwarder(("0.0.0.0", 0), (host, int(port)))  # noqa: S104 - of a network without a way out
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
            server.server_close()  # waits for the connections


@dataclass
class Host:
    """A host: its first process, with which everything on it ends, and its two cables."""

    name: str
    network: Network = field(repr=False)
    environment: dict[str, str] = field(default_factory=dict)
    """What a test adds to the environment of what it starts here."""

    def __post_init__(self) -> None:
        first = f"hostname {self.name} && echo made && exec sleep infinity"
        # Whoever has started the host may be killed: it then is lost, too.
        command = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "sh", "-c", first]
        # Unshare complains of the death that a host is to have.
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._holder.stdout is not None
        with self._holder.stdout as stdout:
            assert stdout.readline() == "made\n"
        (first_process,) = psutil.Process(self._holder.pid).children()
        self.init = first_process.pid
        """Process id of the first process, as it is seen from outside."""
        self.ends: dict[Cable, str] = {}
        """The ends of the cables in the servers' network."""
        with self.entered():
            _ip("link set lo up")
        self.servers = {cable: self.network.lay(self, cable) for cable in CABLES}
        """Address at which this host reaches a server."""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in the host's network within the block: what it connects to is there."""
        descriptor = os.open(f"/proc/{self.init}/ns/net", os.O_RDONLY)
        try:
            with _entered(descriptor):
                yield
        finally:
            os.close(descriptor)

    def cut(self, *cables: Cable) -> None:
        """Cut these cables; they stay so until they are mended."""
        self.network.ip(*(f"link set {self.ends[cable]} down" for cable in cables))

    def mend(self, *cables: Cable) -> None:
        """Mend these cables."""
        self.network.ip(*(f"link set {self.ends[cable]} up" for cable in cables))

    def die(self) -> None:
        """Lose power: no connection is closed, and no process does anything more. Harmless when repeated."""
        if self._holder.returncode is None:
            self.cut(*CABLES)
            os.kill(self.init, signal.SIGKILL)
            self._holder.wait()

    def command(self, *command: str, folder: str) -> list[str]:
        """What runs a command on this host, in a folder."""
        kinds = [f"--{kind}" for kind in ("net", "uts", "mount", "pid")]
        return ["nsenter", f"--target={self.init}", *kinds, f"--wd={folder}", *command]


def enter(init: int) -> None:
    """Go on in a child of this process, on the host with this first process. This process ends as its child does."""
    descriptors = [os.open(f"/proc/{init}/ns/{kind}", os.O_RDONLY) for kind in _KINDS]
    for descriptor in descriptors:
        _call("setns", descriptor, 0)
        os.close(descriptor)
    if (child := os.fork()) != 0:
        _, status = os.waitpid(child, 0)
        os._exit(code if (code := os.waitstatus_to_exitcode(status)) >= 0 else 128 - code)


class _Forwarder(socketserver.ThreadingTCPServer):
    """Passes the bytes of each connection on, both ways, until one side closes it."""

    def __init__(self, address: tuple[str, int], to: tuple[str, int]) -> None:
        self.closing = closing = threading.Event()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError), socket.create_connection(to) as server:
                    other = {self.request: server, server: self.request}
                    while not closing.is_set():
                        for end in select.select(list(other), [], [], 0.2)[0]:
                            if not (piece := end.recv(1 << 16)):
                                return
                            other[end].sendall(piece)

        super().__init__(address, Handler)


@contextmanager
def _entered(descriptor: int) -> Iterator[None]:
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _call("setns", descriptor, _CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", own, _CLONE_NEWNET)
    finally:
        os.close(own)


def _call(function: str, *arguments: int) -> None:
    """A function of the C library that Python does not have before 3.12."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def _ip(*commands: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), env={"PATH": _path()}, text=True, check=True)


def _path() -> str:
    """Where commands are looked for: `ip` may lie where only root's PATH leads."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
