"""`docs/skypilot.yaml`: SkyPilot itself reads it, and what a node would run is run here, in a process."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.database.migrate import upgrade
from service.database.opening import open_database
from service.jobs.workers import list_workers
from service.settings import Settings
from service.storage.installation import join_installation
from service.storage.opening import open_store

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "skypilot.yaml"
TASK: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
SKYPILOT = Path(sys.prefix) / "skypilot"
"""Where `make setup` installs it: without what it depends on, which is a web server and drivers of clouds."""

GIVEN: dict[str, Any] = {
    "envs": {"NANOMOE_STORE": "s3://bucket/team", "AWS_REGION": "eu-central-1"},
    "secrets": dict.fromkeys(("NANOMOE_DATABASE_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "secret"),
}
"""What whoever launches it has given."""

READ = """
import json
import sys
from unittest.mock import MagicMock

# What only SkyPilot's server needs, and a task file does not.
for name in sys.argv[1:]:
    sys.modules[name] = MagicMock(__path__=[], __spec__=None)
import sky

def read(task, envs, secrets):
    try:
        task = sky.Task.from_yaml_config(task, env_overrides=[*envs.items()], secrets_overrides=[*secrets.items()])
    except (ValueError, sky.exceptions.InvalidSkyPilotConfigError) as error:
        return str(error)
    (resources,) = task.resources
    return {"nodes": task.num_nodes, "hooks": resources.hooks, "down": resources.autostop_config.down}

print(json.dumps([read(**asked) for asked in json.load(sys.stdin)]))
"""
ABSENT = (
    *("aiosqlite", "aiosqlite.context", "cachetools", "casbin", "ijson", "paramiko", "paramiko.config", "passlib"),
    *("prettytable", "psycopg2", "sqlalchemy_adapter"),
)


def _read(folder: Path, tasks: list[dict[str, Any]]) -> list[Any]:
    """What SkyPilot makes of each task, a text where it refuses one; its own folder lies in `folder`."""
    environment = {**os.environ, "HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    environment["PYTHONPATH"] = str(SKYPILOT)
    done = subprocess.run(
        [sys.executable, "-c", READ, *ABSENT],
        input=json.dumps(tasks),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_skypilot_takes_the_task(tmp_path: Path) -> None:
    if not SKYPILOT.is_dir():
        pytest.skip("skypilot is not installed")
    wrong = [{"num_node": 3}, {"resources": {"cpu": "4+"}}, {"config": {"hooks": [{"run": "", "events": ["stop"]}]}}]
    asked = [GIVEN | {"task": TASK}, *(GIVEN | {"task": TASK | part} for part in wrong)]
    read, *refused, lacking = _read(tmp_path, [*asked, GIVEN | {"task": TASK, "envs": {}}])
    (hook,) = read.pop("hooks")
    assert read == {"nodes": 2, "down": True}
    assert sorted(hook["events"]) == ["down", "preemption", "stop"]
    assert [text for text in refused if not isinstance(text, str)] == []
    assert "NANOMOE_STORE" in lacking


def test_a_worker_of_a_node_is_drained_by_the_hook(tmp_path: Path) -> None:
    program = tmp_path / "nanomoe" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', "utf-8")
    program.chmod(0o755)
    settings = Settings(_env_file=None, data_dir=tmp_path / "nanomoe-data")
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_NUM_GPUS_PER_NODE": "0"}
    (hook,) = TASK["config"]["hooks"]
    with closing(open_database(settings)) as db:
        upgrade(db)
        join_installation(db, open_store(settings), create=True)
        with subprocess.Popen(["bash", "-c", TASK["run"]], cwd=ROOT, env=environment, process_group=0) as node:
            try:
                give_up = time.monotonic() + 120
                while not list_workers(db):
                    assert node.poll() is None
                    assert time.monotonic() < give_up
                    db.changes.wait(0.1)
                subprocess.run(["bash", "-c", hook["run"]], env=environment, check=True, timeout=120)
                assert node.wait(60) == 0
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(node.pid, signal.SIGKILL)  # the worker too, where it was not drained
        ((worker, _),) = list_workers(db)
        assert worker.stopped_at is not None
