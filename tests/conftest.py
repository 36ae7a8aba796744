"""What holds for every test: one torch thread, no model hub, reproducible examples, shared fixtures."""

import os

# Before any test imports torch or transformers; the processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

pytest_plugins = ("tests.api", "tests.databases", "tests.races", "tests.skips")

# No deadline: a shared machine stalls now and then. In CI the examples are the same every time.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("project")
