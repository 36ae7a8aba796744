"""What holds for every test: one torch thread, no model hub, Ctrl-C, reproducible examples, shared fixtures."""

import os
import signal

# Before any test imports torch or transformers; the processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the services that tests start are never asked to generate.
os.environ.setdefault("NANOMOE_ENGINE_PRELOAD", "false")

import pytest
from hypothesis import settings

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.api", "tests.databases", "tests.queued", "tests.races", "tests.skips")

# No deadline: a shared machine stalls now and then. In CI the examples are the same every time.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("project")

_LONGEST_FIRST = ("test_readme.py", "test_exact_resume.py", "test_reference_run.py", "test_soak.py", "test_fuzz.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take a minute or more: at the end one of them would run alone."""
    items.sort(key=lambda item: item.path.name not in _LONGEST_FIRST)
