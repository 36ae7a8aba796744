"""`/metrics` as a Prometheus server reads it."""

import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.http import instruments
from service.jobs import queue
from service.jobs.workers import worker_started, worker_stopped
from tests.api import Api, Serve
from tests.databases import Clock
from tests.service.http.routes.test_generate import generate
from tests.service.tiny_checkpoint import tiny_files


def scrape(api: Api) -> dict[str, float]:
    """{name or name{label="value"}: value}."""
    answer = api.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_metrics_of_the_database_match_its_tables(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "_COUNT_SECONDS", 0.0)
    api = serve()
    before = scrape(api)
    assert before['nanomoe_jobs{status="queued"}'] == before["nanomoe_workers"] == before["nanomoe_queue_age_seconds"]
    worker_started(api.db, api.worker)
    api.running()
    api.submit()
    now = scrape(api)
    assert {status: now[f'nanomoe_jobs{{status="{status}"}}'] for status in ("queued", "running", "failed")} == {
        "queued": 1, "running": 1, "failed": 0
    }  # fmt: skip
    assert now["nanomoe_queue_age_seconds"] > 0
    assert (now["nanomoe_workers"], now["nanomoe_worker_slots"]) == (1, 1)
    assert now["nanomoe_training_tokens_per_second"] == 100
    assert now["process_resident_memory_bytes"] > 0
    worker_stopped(api.db, api.worker.id)
    assert scrape(api)["nanomoe_workers"] == 0


def test_the_age_of_a_job_submitted_by_a_clock_ahead_counts_from_its_first_scrape(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruments, "_COUNT_SECONDS", -1.0)
    api = serve()
    clock = Clock(api.db)
    clock.advance(7200)
    api.submit()
    clock.advance(-7200)
    scrape(api)
    passed = time.monotonic()
    monkeypatch.setattr(instruments, "_clock", lambda: passed + 90.0)
    assert scrape(api)["nanomoe_queue_age_seconds"] >= 90
    clock.advance(7200 + 600)
    assert scrape(api)["nanomoe_queue_age_seconds"] == 600


def test_jobs_are_not_counted_at_each_scrape(serve: Serve) -> None:
    api = serve()
    scrape(api)
    api.submit()
    assert scrape(api)['nanomoe_jobs{status="queued"}'] == 0


def test_generation_is_counted(serve: Serve, tmp_path: Path) -> None:
    api = serve()
    claim = api.claim(api.submit()["id"])
    api.record_checkpoint(claim, 0, 0, tiny_files(tmp_path / "tiny"))
    queue.finish(api.db, claim, "succeeded")
    assert scrape(api)["nanomoe_generation_cached_checkpoints"] == 0
    assert generate(api, job_id=claim.job_id, max_new_tokens=7, n=2).status_code == 200
    now = scrape(api)
    assert now['nanomoe_generation_tokens_total{kind="prompt"}'] == 11
    assert now['nanomoe_generation_tokens_total{kind="completion"}'] == 14
    assert now["nanomoe_generation_first_token_seconds_count"] == 1
    assert now['nanomoe_generation_requests_total{outcome="finished"}'] == 1
    assert (now["nanomoe_generation_waiting"], now["nanomoe_generation_running"]) == (0, 0)
    assert now["nanomoe_generation_cached_checkpoints"] == 1
    assert now["nanomoe_generation_cache_bytes"] > 0


def test_a_failed_generation_is_counted_as_failed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = serve()
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert generate(api, job_id=api.running().job_id).status_code == 503
    now = scrape(api)
    assert now['nanomoe_generation_requests_total{outcome="failed"}'] == 1
    assert now["nanomoe_generation_first_token_seconds_count"] == 0
