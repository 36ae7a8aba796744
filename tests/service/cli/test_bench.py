"""`nanomoe bench`: what it measures through a service of its own."""

import pytest

from service.cli.bench import lifecycle, tables
from service.cli.bench.temporary_service import run_service
from tests.service.cli.conftest import Run


def test_generation_is_measured_through_http_too(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanomoe.bench.models._STEPS", 2)
    monkeypatch.setattr("nanomoe.bench.generation._MOST_NEW_TOKENS", 8)
    options = ["--vocab", "8192", "--models", "dense", "--at-once", "2", "--turns", "1", "--no-transformers"]
    result = nanomoe("bench", "generate", *options, "--json")
    assert result.code == 0, result.err
    figures = result.json
    (served,) = figures["http"]
    assert served["ratio"] == pytest.approx(served["http_tok_per_sec"] / served["engine_tok_per_sec"])
    assert 0 < served["first_token_seconds"] < 60
    assert [one["vocab_size"] for one in figures["engine"]] == [8192]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "sparse"], "there are dense, mixture"),
        (["--at-once", "many"], "must look like 1,8,32"),
        (["--at-once", "2000000"], "numbers from 1 to 1,000,000"),
    ],
)
def test_an_invalid_measurement_is_a_usage_error(nanomoe: Run, options: list[str], said: str) -> None:
    result = nanomoe("bench", "generate", *options)
    assert result.code == 2
    assert said in result.err


def test_a_claim_is_timed_with_the_given_number_of_queued_jobs() -> None:
    with run_service() as site:
        times = []
        for one in lifecycle.claim_times(site.database, (1, 40)):
            times.append(one)
            left = lifecycle._n_queued(site.database)
            assert left == one.n_queued - min(one.n_queued, 30)
        assert [one.n_queued for one in times] == [1, 40]
        assert all(0 < one.median_seconds <= one.max_seconds for one in times)


def test_submissions_are_counted_and_cancelled() -> None:
    with run_service() as site:
        seen = lifecycle.traffic(site, training=False, seconds=2)
        assert seen.submits_per_sec > 1
        assert 0 < seen.get_p50_seconds <= seen.get_p99_seconds
        assert lifecycle._n_queued(site.database) == 0


def test_a_second_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_GIVE_UP_SECONDS", 0.1)
    monkeypatch.setattr(lifecycle, "_wait", lambda *_: 0.0)
    monkeypatch.setattr("service.cli.processes.Processes.start_worker", lambda *_: None)
    with pytest.raises(AssertionError, match="the second worker did not start"):
        lifecycle.recovery(lease_seconds=3, settle=0)


def test_the_time_after_a_killed_worker_names_the_database_it_was_measured_on() -> None:
    delays = lifecycle.Delays(1, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    table = tables.delays_table(delays, [lifecycle.Recovery("sqlite", 60, 61.0, 62.0)])
    assert list(table.columns[0].cells)[-1] == "worker killed, lease 60 s, sqlite"
