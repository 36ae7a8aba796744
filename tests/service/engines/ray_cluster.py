"""A real Ray cluster on loopback for tests: nodes that can be killed and come back, with token and persistent head."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[3]
START_SECONDS = 120


class RayNode:
    """A node: the process that started it, its raylet, and all that runs on it."""

    def __init__(self, environment: dict[str, str], **parameters: Any) -> None:
        command = [sys.executable, "-m", "tests.service.engines.ray_node", json.dumps(parameters)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        watchdog = threading.Timer(START_SECONDS, self._process.kill)
        watchdog.start()
        try:
            assert self._process.stdout is not None
            assert self._process.stdout.readline().strip(), "the node has not come up"
        finally:
            watchdog.cancel()
        self.raylet = next(one for one in self.tree() if one.name() == "raylet")

    def tree(self) -> list[psutil.Process]:
        """The processes that run on it."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def lose(self) -> None:
        """Kill the node's own processes, at once. Those of workers notice by themselves."""
        for process in self.tree():
            if process.ppid() == self._process.pid:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill all that was started, and reap what is ours."""
        processes = self.tree()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.communicate()
        psutil.wait_procs(processes, timeout=60)


class RayCluster:
    """A head without CPUs, and nodes that have them."""

    def __init__(self) -> None:
        # Not pytest's folder: the path of a Unix socket has 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        self.address = f"127.0.0.1:{self._port}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self._folder / "head"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Otherwise Ray takes the machine's own address in place of loopback's, and listens to the network.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # It asks less often whether a node lives than a test wants to wait.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
        }
        (self._folder / "head").mkdir()
        self._nodes: list[RayNode] = []
        self.head = self.start_head()

    def start_head(self) -> RayNode:
        """Start the head, with what an earlier one has stored."""
        self.head = self._started(gcs_server_port=self._port, temp_dir=str(self._folder / "t"), num_cpus=0)
        return self.head

    def add_node(self, cpus: int, gpus: int = 0) -> RayNode:
        """Add a node that claims to have so many."""
        return self._started(gcs_address=self.address, num_cpus=cpus, num_gpus=gpus)

    def _started(self, **parameters: Any) -> RayNode:
        node = RayNode(self.environment, **parameters)
        self._nodes.append(node)
        return node

    def process(self, title: str) -> psutil.Process:
        """The process of an actor, by the title that Ray gives it."""
        running = (process for node in self._nodes for process in node.tree())
        return next(process for process in running if title in " ".join(process.cmdline()))

    def logs(self) -> str:
        """What the actors and their workers have written, for the message of a failed test."""
        files = sorted(self._folder.glob("t/session_*/logs/worker-*.err"))
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def end_nodes(self) -> None:
        """End all nodes but the head."""
        for node in self._nodes:
            if node is not self.head:
                node.end()

    def end(self) -> None:
        for node in self._nodes:
            node.end()
        shutil.rmtree(self._folder)
