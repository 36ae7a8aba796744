"""The API as a process and as a whole: how it starts and stops, whom it answers, what it documents."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from service.errors import StartRefused
from service.http.guard import check_address
from service.settings import Settings
from tests.api import TEXT, Api, Serve, serving
from tests.databases import ONLY_POSTGRESQL

ROOT = Path(__file__).parents[2]


@contextmanager
def process(data_dir: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m service` on a free port, and its address."""
    started = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "service", "--port", "0", *arguments],
        cwd=ROOT,
        env={**os.environ, "NANOMOE_DATA_DIR": str(data_dir), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.fullmatch(r"nanomoe listening on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, started.communicate(timeout=30))
        yield started, found[1]
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_prints_its_address_and_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path) as (started, url):
        assert httpx.get(f"{url}/healthz").json()["status"] == "ok"
        assert httpx.get(f"{url}/readyz").json()["database"] == "sqlite"
        job_id = httpx.post(f"{url}/jobs", json={"text": TEXT}).json()["id"]
        with httpx.stream("GET", f"{url}/jobs/{job_id}/events", timeout=10) as events:
            lines = events.iter_lines()
            assert next(lines) == "event: status"
            started.send_signal(number)
            for _ in lines:
                pass
        assert started.wait(5) == 0
    with process(tmp_path) as (_, url):
        assert httpx.get(f"{url}/jobs/{job_id}").json()["status"] == "queued"


def test_it_starts_without_torch_and_without_transformers() -> None:
    script = "import sys, service.app; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def run_to_its_end(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", "--port", "0"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_refuses_to_serve_other_machines_without_keys(tmp_path: Path) -> None:
    found = run_to_its_end(NANOMOE_DATA_DIR=str(tmp_path), NANOMOE_HOST="0.0.0.0")  # noqa: S104
    assert found.returncode == 2
    assert "NANOMOE_ALLOW_NO_KEYS" in found.stderr
    assert "nanomoe keys create" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])  # noqa: S104
def test_only_loopback_needs_no_keys(tmp_path: Path, host: str) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path, host=host)
    with pytest.raises(StartRefused):
        check_address(settings, has_keys=False)
    check_address(settings, has_keys=True)
    check_address(settings.model_copy(update={"allow_no_keys": True}), has_keys=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "localhost", "::1"])
def test_loopback_is_served(tmp_path: Path, host: str) -> None:
    check_address(Settings(_env_file=None, data_dir=tmp_path, host=host), has_keys=False)


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    found = run_to_its_end(NANOMOE_DATA_DIR=str(tmp_path), NANOMOE_MAX_STEPS="many")
    assert found.returncode == 2
    assert found.stderr.startswith("nanomoe does not start: NANOMOE_MAX_STEPS: ")
    assert "Traceback" not in found.stderr


def test_an_unreachable_database_is_reported_without_a_traceback(tmp_path: Path) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"
    found = run_to_its_end(NANOMOE_DATA_DIR=str(tmp_path), NANOMOE_DATABASE_URL=url)
    assert found.returncode == 2
    assert "nanomoe does not start" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "localhost@evil"]
)
def test_a_foreign_host_is_refused(api: Api, host: str) -> None:
    for method in ("GET", "POST"):
        answer = api.http.request(method, "/jobs", headers={"Host": host})
        assert (answer.status_code, answer.json()["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_loopback_has_several_names(api: Api, host: str) -> None:
    assert api.http.get("/healthz", headers={"Host": host}).status_code == 200


def test_more_hosts_can_be_named(serve: Serve) -> None:
    api = serve(allowed_hosts=("Trainer.Example",))
    assert api.http.get("/healthz", headers={"Host": "trainer.example:8000"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://[", "http://127.0.0.1:1", "ftp://x"])
def test_a_foreign_origin_cannot_change_anything(api: Api, origin: str) -> None:
    before = api.http.get("/jobs").json()
    job_id = api.submit()["id"]
    for method, path in [("POST", "/jobs"), ("POST", f"/jobs/{job_id}/cancel"), ("DELETE", f"/jobs/{job_id}"),
                         ("PATCH", f"/jobs/{job_id}")]:  # fmt: skip
        answer = api.http.request(method, path, headers={"Origin": origin}, json={"text": TEXT})
        assert (answer.status_code, answer.json()["code"]) == (403, "origin_not_allowed")
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "queued"
    assert len(api.http.get("/jobs").json()["data"]) == len(before["data"]) + 1


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 201), ("none", 201)]
)
def test_a_request_without_an_origin_is_judged_by_what_the_browser_says_of_its_page(
    api: Api, site: str, status: int
) -> None:
    answer = api.http.post("/jobs", headers={"Sec-Fetch-Site": site}, json={"text": TEXT})
    assert answer.status_code == status


def test_the_own_origin_may_change_things(api: Api) -> None:
    assert api.http.post("/jobs", headers={"Origin": api.url}, json={"text": TEXT}).status_code == 201
    assert api.http.get("/jobs", headers={"Origin": "http://evil.example"}).status_code == 200


def test_an_unknown_path_and_an_unknown_method_are_problems(api: Api) -> None:
    for method, path, status, code in [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/jobs/", 404, "not_found"),
        ("GET", "/static/../app.py", 404, "not_found"),
        ("GET", "/static/%2e%2e/app.py", 404, "not_found"),
        ("PUT", "/jobs", 405, "method_not_allowed"),
        ("POST", "/static/vendor/README.md", 405, "method_not_allowed"),
    ]:
        answer = api.http.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (status, code), path
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_wrong_method_is_answered_with_the_allowed_ones(api: Api) -> None:
    for path, allowed in [
        (f"/jobs/{'0' * 32}", "DELETE, GET, HEAD, OPTIONS, PATCH"),
        ("/jobs", "GET, HEAD, OPTIONS, POST"),
        ("/generate", "OPTIONS, POST"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
        ("/static/vendor/README.md", "GET, HEAD, OPTIONS"),
    ]:
        wrong, asked = api.http.put(path), api.http.options(path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, allowed)
        assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allowed, b"")
    answer = api.http.head("/generate")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "OPTIONS, POST", b"")


def test_a_foreign_origin_gets_no_cors_headers(api: Api) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = api.http.options("/jobs", headers=asked)
    assert answer.status_code == 204
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_docs_fetch_nothing_from_elsewhere(api: Api) -> None:
    page = api.http.get("/docs").text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(addresses) == 3
    for address in addresses:
        assert address.startswith("/static/vendor/")
        assert api.http.get(address).status_code == 200
    assert "://" not in page
    assert "url: '/openapi.json'" in page
    assert '"validatorUrl": null' in page


def test_vendored_files_are_the_ones_that_were_noted() -> None:
    vendor = ROOT / "service" / "static" / "vendor"
    notes = (vendor / "README.md").read_text(encoding="utf-8")
    noted = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", notes, re.MULTILINE))
    licences = {"LICENSE", "NOTICE", "README.md"}
    there = {
        path.relative_to(vendor).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in vendor.rglob("*")
        if path.is_file() and path.name not in licences and path.suffix != ".txt"
    }
    assert there == noted


def test_a_database_out_of_reach_is_503_everywhere(api: Api) -> None:
    job_id = api.finished()

    @sa.event.listens_for(api.db.engine, "begin")
    def refuse(connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("BEGIN", {}, Exception("the server is gone"))

    try:
        for method, path in [
            ("POST", "/jobs"), ("GET", "/jobs"), ("GET", "/readyz"), ("GET", "/workers"), ("GET", f"/jobs/{job_id}"),
            ("PATCH", f"/jobs/{job_id}"), ("DELETE", f"/jobs/{job_id}"), ("POST", f"/jobs/{job_id}/cancel"),
            ("GET", f"/jobs/{job_id}/text"), ("GET", f"/jobs/{job_id}/metrics"), ("GET", f"/jobs/{job_id}/metrics.csv"),
            ("GET", f"/jobs/{job_id}/events"), ("GET", f"/jobs/{job_id}/checkpoints"),
            ("GET", f"/jobs/{job_id}/checkpoints/0/files/config.json"),
        ]:  # fmt: skip
            body = {"text": TEXT} if path == "/jobs" else {}
            answer = api.http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable"), path
            assert int(answer.headers["retry-after"]) > 0
        assert api.http.get("/healthz").status_code == 200
    finally:
        sa.event.remove(api.db.engine, "begin", refuse)
    assert api.http.get(f"/jobs/{job_id}").status_code == 200


def test_a_long_poll_waits_for_a_database_that_is_away_until_its_time_is_over(api: Api) -> None:
    job_id = api.submit()["id"]
    refused = threading.Event()

    def refuse(connection: sa.Connection) -> None:
        refused.set()
        raise sa.exc.OperationalError("BEGIN", {}, Exception("the server is gone"))

    def wait(seconds: float) -> httpx.Response:
        return api.http.get(f"/jobs/{job_id}", params={"wait": seconds, "seen": "queued"})

    with ThreadPoolExecutor(1) as pool:
        sa.event.listen(api.db.engine, "begin", refuse)
        try:
            assert wait(0.1).json()["code"] == "database_unavailable"
            refused.clear()
            waiting = pool.submit(wait, 20)
            assert refused.wait(10)
        finally:
            sa.event.remove(api.db.engine, "begin", refuse)
        assert api.http.post(f"/jobs/{job_id}/cancel").status_code == 202
        assert waiting.result(15).json()["status"] == "cancelled"


@ONLY_POSTGRESQL
def test_a_long_poll_outlives_connections_that_are_cut(settings: Settings) -> None:
    with serving(settings.model_copy(update={"port": 0})) as api, ThreadPoolExecutor(1) as pool:
        job_id = api.submit()["id"]
        asked = threading.Event()

        def wait() -> Any:
            asked.set()
            return api.http.get(f"/jobs/{job_id}", params={"wait": 30, "seen": "queued"}).json()["status"]

        waiting = pool.submit(wait)
        asked.wait()
        with api.db.engine.connect() as connection:
            # With its second argument it returns when they are gone: no later question is asked over a dying one.
            cut = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND "
            connection.execute(sa.text(cut + "datname = current_database()"))
        assert api.http.post(f"/jobs/{job_id}/cancel").status_code == 202
        assert waiting.result(30) == "cancelled"


def test_an_unexpected_exception_is_a_problem_without_details(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("service.jobs.workers.list_workers", fail)
    with capture_logs() as logged:
        answer = api.http.get("/workers")
    assert [(entry["event"], entry["path"]) for entry in logged] == [("unexpected_error", "/workers")]
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
