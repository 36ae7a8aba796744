"""Processes that are forked from one that has imported already what they need: torch alone takes two seconds of CPU.

There is one such server for each process of tests; it starts when the first process is wanted, and runs nothing else.
"""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.worker.run_worker", "worker.trainer", "nanomoe.training.cohort"])
