"""A client that `openapi-python-client` makes of the OpenAPI document: it has every route, and it works."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api import TEXT, Api

GENERATOR = Path(sys.prefix) / "openapi-python-client"
"""Where `make setup` installs it."""

GENERATE = """
import sys
from pathlib import Path
from openapi_python_client import generate
from openapi_python_client.config import Config, ConfigFile, MetaType

document, folder = map(Path, sys.argv[1:])
settings = ConfigFile(post_hooks=[])
for fault in generate(config=Config.from_sources(settings, MetaType.NONE, document, "utf-8", False, folder)):
    print(fault.level, fault.header, fault.detail, file=sys.stderr)
"""


def test_a_generated_client_has_every_route_and_works(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GENERATOR.is_dir():
        pytest.skip("openapi-python-client is not installed")
    document = tmp_path / "openapi.json"
    document.write_bytes(api.http.get("/openapi.json").content)
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, document, tmp_path / "generated_client"],
        env={**os.environ, "PYTHONPATH": str(GENERATOR)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")

    monkeypatch.syspath_prepend(tmp_path)

    def function(tag: str, name: str) -> Callable[..., Any]:
        made = importlib.import_module(f"generated_client.api.{tag}.{name}")
        found: Callable[..., Any] = made.sync_detailed
        return found

    operations = [
        operation for path in api.http.get("/openapi.json").json()["paths"].values() for operation in path.values()
    ]
    assert len(operations) > 20
    for operation in operations:
        assert callable(function(operation["tags"][0], operation["operationId"]))

    client = importlib.import_module("generated_client").Client(base_url=api.url)
    request = importlib.import_module("generated_client.models").SubmitRequest(text=TEXT, name="gato")
    submitted = function("jobs", "submit_job")(client=client, body=request)
    assert (submitted.status_code, submitted.parsed.status) == (201, "queued")
    assert function("jobs", "get_job")(submitted.parsed.id, client=client).parsed.name == "gato"
    assert function("jobs", "get_job_text")(submitted.parsed.id, client=client).parsed == TEXT
    weights = function("checkpoints", "get_checkpoint_file")(
        api.finished(), "latest", "model.safetensors", client=client
    )
    assert len(weights.parsed.payload.read()) == 1024
    client.get_httpx_client().close()
