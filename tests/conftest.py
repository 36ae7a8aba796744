"""What holds for every test: one torch thread, no model hub, an engine with its share of the CPU, Ctrl-C, reproducible
examples, shared fixtures.
"""

import os
import signal
import sys
from pathlib import Path

# Before any test imports torch or transformers; the processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# An engine that yields the CPU gets next to none beside other tests, and whoever waits for it waits in vain.
os.environ.setdefault("NANOMOE_ENGINE_NICE", "0")
# Most of the services that tests start are never asked to generate.
os.environ.setdefault("NANOMOE_ENGINE_PRELOAD", "false")
# Whether loops have been compiled on this machine decides nothing: a test of the fused step asks for it.
os.environ.setdefault("NANOMOE_STEP_PATH", "eager")
# Which jobs are claimed together is for a test to say.
os.environ.setdefault("NANOMOE_COHORT", "1")
# Kernels are computed by Triton's interpreter where there is no GPU: read when they are defined.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = (
    "tests.api",
    "tests.buckets",
    "tests.databases",
    "tests.queued",
    "tests.races",
    "tests.skips",
    "tests.slurm",
)

# No deadline: a shared machine stalls now and then. In CI the examples are the same every time.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("project")

_LONGEST_FIRST = (
    "test_documented_commands.py",
    "test_exact_resume.py",
    "test_reference_run.py",
    "test_on_ray.py",
    "test_on_slurm.py",
    "test_soak.py",
    "test_fuzz.py",
)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's, which can be switched off
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a third of the time tests wait, for leases that pass and processes that start."""
    return (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take a minute or more: at the end one of them would run alone."""
    items.sort(key=lambda item: item.path.name not in _LONGEST_FIRST)
