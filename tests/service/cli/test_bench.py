"""`nanomoe bench`: what it measures through a service of its own."""

from dataclasses import replace

import pytest

from nanomoe.bench.training.shapes import Shape
from nanomoe.config import JobConfig
from service.cli.bench import lifecycle, rows, tables
from service.cli.bench.temporary_service import run_service
from service.cli.bench.turnaround import Split, Times, Turnaround
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
        (["generate", "--models", "sparse"], "there are dense, mixture"),
        (["generate", "--at-once", "many"], "must look like 1,8,32"),
        (["generate", "--at-once", "2000000"], "numbers from 1 to 1,000,000"),
        (["jobs", "--only", "lunch"], "there are traffic, delays, beside, turnaround, claims, recovery"),
        (["train", "--only", "all"], "there are steps, evaluation, growth"),
        (["train", "--shapes", "large"], "there are reference, reference-50k, small, gpt2"),
        (["train", "--device", "abacus"], "--device abacus"),
        (["train", "--device", "cuda:77"], "CUDA devices"),
        (["generate", "--device", "cuda:77"], "CUDA devices"),
    ],
)
def test_an_invalid_measurement_is_a_usage_error(nanomoe: Run, options: list[str], said: str) -> None:
    result = nanomoe("bench", *options)
    assert result.code == 2
    assert said in result.err


def test_training_is_measured_in_all_its_parts(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Shape("tiny", JobConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, batch_size=2), 256, 2, 8)
    monkeypatch.setattr("nanomoe.bench.training.shapes.SHAPES", {"tiny": tiny})
    monkeypatch.setattr("nanomoe.bench.training.growth.TOKENS", 16)
    axes = {"layers": {1: {"n_layer": 1, "n_embd": 8, "block_size": 8}}}
    monkeypatch.setattr("nanomoe.bench.training.growth.AXES", axes)
    options = ["--turns", "1", "--steps", "2", "--dropout", "0", "--texts", "100", "--job-steps", "4"]
    given = ["bench", "train", "--only", "steps,evaluation,growth", *options]
    result = nanomoe(*given, "--json")
    assert result.code == 0, result.err
    figures = result.json
    assert [one["shape"] for one in figures["steps"]] == ["tiny", "tiny-mixture"]
    losses = {one["who"]: one["loss"] for one in figures["steps"][0]["measured"]}
    assert losses["transformers"] == pytest.approx(losses["eager"], rel=1e-5)
    assert figures["evaluation"][0]["n_trained_tokens"] == 4 * 99
    assert {point["axis"] for point in figures["growth"]} == {"layers"}
    assert "nanoGPT: no --nanogpt FOLDER was given" in figures["not_measured"]
    assert (
        "tiny-mixture, transformers: no class of transformers computes this mixture of experts"
        in (figures["not_measured"])
    )
    shown = nanomoe(*given).out
    for said in ("loop over experts", "x transformers", "of dense", "GFLOP/s", "not training", "µs per token"):
        assert said in shown


def test_jobs_follow_one_another_through_one_worker(nanomoe: Run) -> None:
    options = ["--jobs", "1", "--tiny", "3", "--most-seconds", "0", "--job-steps", "4"]
    result = nanomoe("bench", "jobs", "--only", "turnaround", *options, "--json")
    assert result.code == 0, result.err
    measured = result.json["turnaround"]
    assert measured["reference_steps"] == 4
    assert measured["script_loss"] == pytest.approx(measured["job_loss"], rel=0.01)
    script, job = measured["script_seconds"]["median"], measured["submit_to_succeeded"]["median"]
    assert measured["times_as_fast_as_script"] == pytest.approx(script / job)
    for name in ("submit_to_first_step", "end_to_next_first_step", "cancelled_to_next_first_step"):
        assert 0 < measured[name]["median"] <= measured[name]["p90"]
    # Of three only one was measured, since the time was over; the others were cancelled.
    assert measured["tiny_end_to_next_first_step"]["n"] == 1
    life = sum(part["median"] for part in measured["tiny_split"].values())
    assert measured["tiny_per_minute"] == pytest.approx(60 / life)
    assert "submit to first step, idle worker: " in result.err
    assert "reference job: " in result.err
    assert result.json["delays"] is None
    assert result.json["claims"] == result.json["traffic"] == result.json["recoveries"] == []


def test_nine_tenths_of_the_times_are_within_what_is_said() -> None:
    assert Times.of([float(n) for n in range(1, 21)]) == Times(20, 10.5, 18.0)
    assert Times.of([3.0]) == Times(1, 3.0, 3.0)


def test_a_turnaround_is_shown_with_the_script_and_without() -> None:
    times = Times(3, 1.0, 2.0)
    alone = Turnaround(
        times, times, times, times, Split(times, times, times), 300.0, 500, times, 3.5, None, None, None
    )  # fmt: skip
    assert list(tables.turnaround_table(alone).columns[2].cells)[-1] == "300"
    beside = replace(alone, script_seconds=times, times_as_fast_as_script=5.0, script_loss=3.6)
    assert "ended, loss 3.6000" in list(tables.turnaround_table(beside).columns[1].cells)
    assert len(tables.turnaround_table(beside).rows) == len(tables.turnaround_table(alone).rows) + 2


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
    monkeypatch.setattr(rows, "_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(rows, "wait", lambda *_: 0.0)
    monkeypatch.setattr("service.cli.processes.Processes.start_worker", lambda *_: None)
    with pytest.raises(AssertionError, match="the second worker did not start"):
        lifecycle.recovery(lease_seconds=3, settle=0)


def test_the_time_after_a_killed_worker_names_the_database_it_was_measured_on() -> None:
    delays = lifecycle.Delays(1, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    table = tables.delays_table(delays, [lifecycle.Recovery("sqlite", 60, 61.0, 62.0)])
    assert list(table.columns[0].cells)[-1] == "worker killed, lease 60 s, sqlite"
