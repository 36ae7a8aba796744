"""`nanomoe bench`: what it measures through a service of its own."""

import pytest

from service.cli.bench import lifecycle
from service.cli.bench.site import open_site
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
    [(["--models", "sparse"], "there are dense, mixture"), (["--at-once", "many"], "must look like 1,8,32")],
)
def test_what_cannot_be_measured_is_a_mistake(nanomoe: Run, options: list[str], said: str) -> None:
    result = nanomoe("bench", "generate", *options)
    assert result.code == 2
    assert said in result.err


def test_a_claim_is_timed_with_as_many_jobs_in_line_as_it_says() -> None:
    with open_site() as site:
        times = []
        for one in lifecycle.claim_times(site.database, (1, 40)):
            times.append(one)
            left = lifecycle._n_queued(site.database)
            assert left == one.n_queued - min(one.n_queued, 30)
        assert [one.n_queued for one in times] == [1, 40]
        assert all(0 < one.median_seconds <= one.max_seconds for one in times)


def test_submissions_are_counted_and_taken_back() -> None:
    with open_site() as site:
        seen = lifecycle.traffic(site, training=False, seconds=0.5)
        assert seen.submits_per_sec > 1
        assert 0 < seen.get_p50_seconds <= seen.get_p99_seconds
        assert lifecycle._n_queued(site.database) == 0
