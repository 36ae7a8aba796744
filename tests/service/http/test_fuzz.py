"""schemathesis against the API's own OpenAPI document: every check, every route, and routes after one another.

`NANOMOE_FUZZ_EXAMPLES=200` makes it thorough; by default it is a short look.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.jobs import queue
from tests.api import Api, Serve
from tests.service.tiny_checkpoint import tiny_files

EXAMPLES = os.environ.get("NANOMOE_FUZZ_EXAMPLES", "10")
HERE = Path(__file__).parent

# Rules across fields (n_embd is a multiple of n_head) and limits of the server cannot be said in a JSON schema: what
# the document allows may still be refused there, with a 422 or, for a text in bytes, a 413.
CONFIG = """
[checks]
negative_data_rejection = { expected-statuses = [
    "400", "401", "403", "404", "405", "409", "413", "415", "422", "429", "503",
] }

[[operations]]
include-name = [
    "POST /jobs", "POST /sweeps", "GET /compare", "GET /compare/series", "POST /generate", "POST /score",
    "POST /inspect", "POST /v1/completions", "POST /models",
]
checks = { positive_data_acceptance = { expected-statuses = ["2xx", "404", "409", "413", "422", "429", "503"] } }
"""


@pytest.fixture
def seeded(serve: Serve, tmp_path: Path) -> tuple[Api, list[str], list[str]]:
    """A server, jobs in several states, one that has finished first, and sweeps, one that has finished first."""
    api = serve(max_text_bytes=100_000)
    finished = api.claim(api.submit()["id"])
    files = tiny_files(tmp_path / "tiny")
    for percent in (0, 100):  # a checkpoint that makes no model is a 503, whoever asks for it
        api.record_checkpoint(finished, percent, 5 * percent, files)
    api.record_steps(finished, 1, 3)
    queue.finish(api.db, finished, "succeeded")
    sweeps = [api.submit_finished_sweep()]
    running = api.running()
    sweeps.append(api.submit_sweep()["id"])
    waiting, cancelled = (api.submit()["id"] for _ in range(2))
    api.http.post(f"/jobs/{cancelled}/cancel")
    # The engine starts with the first question, for seconds; what is judged is how long the others take.
    for route in ("generate", "inspect"):
        answer = api.http.post(f"/{route}", json={"job_id": finished.job_id, "prompt": "O gato"}, timeout=120)
        assert answer.status_code == 200, answer.text
    return api, [finished.job_id, running.job_id, waiting, cancelled], sweeps


@pytest.mark.timeout(7200)
def test_schemathesis_finds_nothing(seeded: tuple[Api, list[str], list[str]], tmp_path: Path) -> None:
    api, jobs, sweeps = seeded
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG, encoding="utf-8")
    found = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            *("--config-file", config, "run", f"{api.url}/openapi.json", "--checks", "all"),
            *("--max-examples", EXAMPLES, "--workers", "2", "--request-timeout", "30", "--no-color"),
            *("--generation-database", "none", "--seed", "1"),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": "fuzz_hooks",
            "PYTHONPATH": str(HERE),
            "NANOMOE_FUZZ_JOBS": ",".join(jobs),
            "NANOMOE_FUZZ_FINISHED": jobs[0],
            "NANOMOE_FUZZ_SWEEPS": ",".join(sweeps),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    operations = sum(len(path) for path in api.http.get("/openapi.json").json()["paths"].values())
    assert f"Tested: {operations}\n" in found.stdout
    if report := os.environ.get("NANOMOE_FUZZ_REPORT"):
        Path(report).write_text(found.stdout, encoding="utf-8")
