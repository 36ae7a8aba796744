"""What schemathesis cannot know: ids of jobs that exist, and which legal values make a test slow without testing more.

Loaded by the schemathesis process of `test_fuzz.py`. What is illegal stays as it was made.
"""

# ruff: noqa: S311 - nothing here is secret
import os
import random
import re
from typing import Any

import schemathesis

JOBS = os.environ["NANOMOE_FUZZ_JOBS"].split(",")
FINISHED = os.environ["NANOMOE_FUZZ_FINISHED"]
SWEEPS = os.environ["NANOMOE_FUZZ_SWEEPS"].split(",")
SOME_ID = re.compile(r"[0-9a-f]{32}")
SOME_JOB = re.compile(r"[^\x00-\x1f\x7f/]{1,200}")
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e-?[0-9]+)?")
SHORT_WAIT = 0.05
NOBODY = "0" * 32


def _mostly() -> bool:
    return random.random() < 0.8


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Mostly real jobs and files."""
    if path_parameters and SOME_JOB.fullmatch(str(path_parameters.get("job_id", ""))) and _mostly():
        path_parameters["job_id"] = random.choice(JOBS)
    if path_parameters and SOME_ID.fullmatch(str(path_parameters.get("sweep_id"))) and _mostly():
        path_parameters["sweep_id"] = random.choice(SWEEPS)
    if path_parameters and "name" in path_parameters and _mostly():
        path_parameters["name"] = random.choice(["model.safetensors", "config.json"])
    if path_parameters and "model" in path_parameters and _mostly():
        path_parameters["model"] = random.choice([FINISHED, f"{FINISHED}@100"])
    return path_parameters


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Tokenizers that exist, a real job to generate from, and little to generate."""
    if not isinstance(body, dict):
        return body
    config = body.get("config")
    if isinstance(config, dict) and isinstance(config.get("tokenizer"), str) and _mostly():
        config["tokenizer"] = random.choice(["bytes", "ptbr-8k", "train:300"])
    if SOME_JOB.fullmatch(str(body.get("job_id", ""))) and _mostly():
        body["job_id"] = FINISHED
        if type(body.get("checkpoint", 0)) is int and body.get("checkpoint", 0) in (0, 25, 50, 75, 100):
            body["checkpoint"] = "latest"
    if isinstance(body.get("model"), str) and _mostly():
        body["model"] = FINISHED
    for limit in ("max_new_tokens", "max_tokens"):
        if "prompt" in body and isinstance(body.get(limit), int) and body[limit] > 8:
            body[limit] = 8
    return body


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """The events of a job that goes on, and of all jobs, never end, and a wait is as good when it is short."""
    if case.operation.path.endswith("/events") and SOME_JOB.fullmatch(str(case.path_parameters.get("job_id", ""))):
        case.path_parameters["job_id"] = FINISHED
    if case.operation.path.endswith("/events") and SOME_ID.fullmatch(str(case.path_parameters.get("sweep_id"))):
        case.path_parameters["sweep_id"] = SWEEPS[0]
    if case.operation.path == "/events" and SOME_ID.fullmatch(str((case.query or {}).get("sweep", NOBODY))):
        case.query = {**(case.query or {}), "sweep": NOBODY}
    # Waits arrive here as numbers and as strings; above 120 they are illegal.
    if NUMBER.fullmatch(wait := str((case.query or {}).get("wait"))) and float(wait) <= 120:
        case.query["wait"] = SHORT_WAIT
