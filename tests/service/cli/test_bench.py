"""`nanomoe bench`: what it measures through a service of its own."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from nanomoe.bench.training import cohort, evaluation, growth, steps
from nanomoe.bench.training.shapes import Shape
from nanomoe.config import JobConfig
from service.cli.bench import lifecycle, rows, tables
from service.cli.bench.cohort_rates import CohortRate
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
        (["jobs", "--only", "lunch"], "there are traffic, delays, beside, turnaround, claims, queue, sweeps, recovery"),
        (["train", "--only", "all"], "there are steps, evaluation, growth, cohort"),
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


def measure_once(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Have a module's `measure` give what it gave before, when it is asked for the same again."""
    measure: Callable[..., Any] = module.measure
    given: dict[str, Any] = {}

    def remember(*arguments: Any, said: Any, **options: Any) -> Any:
        asked = repr((arguments, options))
        if asked not in given:
            given[asked] = measure(*arguments, said=said, **options)
        return given[asked]

    monkeypatch.setattr(module, "measure", remember)


def test_training_is_measured_in_all_its_parts(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Shape("tiny", JobConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, batch_size=2), 256, 2, 8)
    monkeypatch.setattr("nanomoe.bench.training.shapes.SHAPES", {"tiny": tiny})
    monkeypatch.setattr("nanomoe.bench.training.growth.TOKENS", 16)
    axes = {"layers": {1: {"n_layer": 1, "n_embd": 8, "block_size": 8}}}
    monkeypatch.setattr("nanomoe.bench.training.growth.AXES", axes)
    monkeypatch.setattr("nanomoe.bench.training.cohort._SHAPES", (tiny,))
    options = ["--turns", "1", "--steps", "2", "--dropout", "0", "--texts", "100", "--job-steps", "4"]
    given = ["bench", "train", "--only", "steps,evaluation,growth,cohort", *options]
    for module in (steps, evaluation, growth, cohort):  # what is shown below is what was measured here
        measure_once(monkeypatch, module)
    result = nanomoe(*given, "--json")
    assert result.code == 0, result.err
    figures = result.json
    assert [one["shape"] for one in figures["steps"]] == ["tiny", "tiny-mixture"]
    losses = {one["who"]: one["loss"] for one in figures["steps"][0]["measured"]}
    assert losses["transformers"] == pytest.approx(losses["eager"], rel=1e-5)
    assert figures["evaluation"][0]["n_trained_tokens"] == 4 * 99
    assert {point["axis"] for point in figures["growth"]} == {"layers"}
    of_cohorts = [(one["shape"], one["n_members"]) for one in figures["cohort"]]
    assert of_cohorts == [(name, n) for name in ("tiny", "tiny-mixture") for n in (2, 4, 16)]
    assert "nanoGPT: no --nanogpt FOLDER was given" in figures["not_measured"]
    assert (
        "tiny-mixture, transformers: no class of transformers computes this mixture of experts"
        in (figures["not_measured"])
    )
    shown = nanomoe(*given).out
    for said in (
        "loop over experts",
        "x transformers",
        "of dense",
        "GFLOP/s",
        "not training",
        "µs per token",
        "jobs together",
    ):
        assert said in shown


def test_jobs_follow_one_another_through_one_worker(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.bench.turnaround._SHORT_STEPS", 4)
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


def test_the_queue_is_measured_with_several_processes(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.bench.queue_rates.WAITING", 60)
    options = ["--connections", "2", "--batches", "1,4", "--seconds", "1", "--rows", "30", "--held-open", "--json"]
    result = nanomoe("bench", "jobs", "--only", "queue", *options)
    assert result.code == 0, result.err
    found = result.json["queue"]
    assert (found["database"], found["n_connections"], found["n_rows"], found["held_open"]) == ("sqlite", 2, 30, True)
    rates = {(one["what"], one["at_once"]): one for one in found["rates"]}
    assert rates["submit, in sweeps", 100]["n_jobs"] % 100 == 0
    assert rates["finish", 1]["n_jobs"] <= rates["claim", 1]["n_jobs"]
    assert all(0 < one["p50_seconds"] <= one["p99_seconds"] for one in found["rates"])


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


def test_the_requests_of_a_sweep_are_measured(nanomoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.bench.sweep_requests.N_JOBS", 100)
    monkeypatch.setattr("service.cli.bench.sweep_requests.N_STEPS", 8)
    result = nanomoe("bench", "jobs", "--only", "sweeps", "--jobs", "2", "--json")
    assert result.code == 0, result.err
    found = {one["request"]: one for one in result.json["sweeps"]["requests"]}
    created, compared = found["POST /sweeps"], found["GET /compare"]
    assert 0 < created["median_seconds"] <= created["max_seconds"]
    assert created["n_bytes"] > 100 * 32  # the jobs' ids
    assert compared["n_bytes"] > 10 * found["POST /sweeps?dry_run=true"]["n_bytes"]
    assert {"GET /compare/series", "DELETE /sweeps/{sweep_id}"} < set(found)


def test_a_sweep_is_measured_with_its_jobs_trained_together(nanomoe: Run) -> None:
    options = ["--in-sweep", "3", "--job-steps", "4", "--shapes", "narrow-bytes", "--widths", "2", "--json"]
    result = nanomoe("bench", "jobs", "--only", "cohort", *options)
    assert result.code == 0, result.err
    (found,) = result.json["cohorts"]
    assert (found["shape"], found["n_jobs"], found["n_steps"], found["width"]) == ("narrow-bytes", 3, 4, 2)
    assert found["jobs_per_minute"] == pytest.approx(60 * 3 / found["seconds"])
    assert found["times_as_fast"] is None
    assert 1 < found["transactions_per_job"] < 1000
    assert found["peak_bytes"] is None or found["peak_bytes"] > 2**26
    assert found["seconds_behind"] > 0
    rate = CohortRate("reference", 64, 100, 16, 60.0, 64.0, 2.5, 3.0, None, 59.0)
    (row,) = zip(*(column.cells for column in tables.cohorts_table([rate]).columns), strict=True)
    assert row == ("64 x reference, 100 steps", "16", "64.0", "2.50", "3.0", "", "59.0 s")
