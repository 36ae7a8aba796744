"""`tests/gpu/run` where there is no GPU: nothing is measured, and every row says why."""

import os
import re
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).with_name("run")


def test_without_a_gpu_everything_is_skipped_for_a_named_reason() -> None:
    command = [sys.executable, RUN, "--tests", "tests/nanomoe/model/test_dropout.py"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    tests, train, generate, _ = done.stdout.splitlines()
    assert re.match(r"tests marked gpu or triton +1 skipped, \d+ deselected \(no CUDA device\)", tests)
    assert re.match(r"bench train +skipped: no CUDA device", train)
    assert re.match(r"bench generate +skipped: no CUDA device", generate)
