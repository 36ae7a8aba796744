"""One node of a Ray cluster on loopback, as a process: `python -m tests.service.engines.ray_node PARAMETERS`, which are
JSON. `ray start` would take the machine's own address in place of 127.0.0.1, and listen to the whole network.

It prints the address of the cluster once it is up, and ends its processes when its standard input does.
"""

import json
import os
import select
import sys
from contextlib import suppress
from typing import Any

import psutil
from ray._private.node import Node
from ray._private.parameter import RayParams


def main(given: dict[str, Any]) -> None:
    """Run a node until the end of standard input. `given`: fields of RayParams; one with `gcs_address` joins."""
    is_head = "gcs_address" not in given
    parameters = RayParams(
        node_ip_address="127.0.0.1",
        object_store_memory=80_000_000,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,  # it would listen to the whole network
        min_worker_port=0,
        max_worker_port=0,
        **given,
    )
    node = Node(parameters, head=is_head, shutdown_at_exit=False, spawn_reaper=False)
    print(node.gcs_address, flush=True)
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # workers look whether their raylet has ended, and a zombie has not
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
