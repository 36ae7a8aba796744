"""Comparing jobs over HTTP: what differs, the figures, groups over seeds, the best, and the curves."""

import csv
from typing import Any

import pytest

from service.jobs import recording
from tests.api import TEXT, Api, Serve

NOBODY = "0" * 32
BYTES = {"tokenizer": "bytes"}


def compare(api: Api, **query: Any) -> dict[str, Any]:
    answer = api.http.get("/compare", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def sweep(api: Api) -> dict[str, Any]:
    """A sweep of four jobs: two learning rates, two seeds; the last two neither ended nor started."""
    made = api.submit_sweep(config=BYTES, grid={"lr": [1e-4, 1e-3]}, seeds=2)
    ids = made["job_ids"]
    for job_id, loss in zip(ids[:2], (1.0, 0.5), strict=True):
        api.finish(api.claim(job_id), loss)
        api.http.post(f"/sweeps/{made['id']}/resume")
    claim = api.claim(ids[2])
    model = {"n_params": 1000, "n_active_params": 1000}
    recording.record_prepared(api.db, claim, execution={"device": "cpu"}, n_tokens=64, total_steps=500, model=model)
    api.record_checkpoint(claim, 0, 0, loss=3.0, perplexity=20.0)
    api.record_steps(claim, 1, 300)
    return made


def test_what_differs_is_shown_and_what_has_been_recorded(api: Api, sweep: dict[str, Any]) -> None:
    found = compare(api, sweep=sweep["id"])
    assert found["parameters"] == [{"name": "lr", "values": [1e-4, 1e-3]}, {"name": "seed", "values": [42, 43]}]
    assert found["metrics"] == ["loss", "perplexity", "bits_per_byte", "val_loss", "accuracy", "tok_per_sec"]
    jobs = found["jobs"]
    assert [job["job_id"] for job in jobs] == sweep["job_ids"]
    assert [job["status"] for job in jobs] == ["succeeded", "succeeded", "running", "paused"]
    assert jobs[1]["values"] == {"lr": 1e-4, "seed": 43}
    assert [(one["percent"], one["step"], one["metrics"]["loss"]) for one in jobs[1]["quarters"]] == [
        (0, 0, 2.0),
        (100, 3, 0.5),
    ]
    assert [len(job["quarters"]) for job in jobs] == [2, 2, 1, 0]
    assert found["best"] == {"metric": "loss", "job_id": sweep["job_ids"][1], "percent": 100, "value": 0.5}


def test_jobs_that_differ_only_in_the_seed_form_a_group(api: Api, sweep: dict[str, Any]) -> None:
    low, high = compare(api, sweep=sweep["id"], perplexity=2.72)["groups"]
    assert (low["values"], low["job_ids"]) == ({"lr": 1e-4}, sweep["job_ids"][:2])
    loss = low["quarters"][-1]["metrics"]["loss"]
    assert (loss["n"], loss["mean"], loss["min"], loss["max"]) == (2, 0.75, 0.5, 1.0)
    assert loss["std"] == pytest.approx(0.125**0.5)
    assert low["quarters"][-1]["metrics"]["val_loss"] is None
    assert low["steps_until"] == {"n": 2, "mean": 3.0, "std": 0.0, "min": 3.0, "max": 3.0}
    assert high["quarters"][0]["metrics"]["loss"] == {"n": 1, "mean": 3.0, "std": None, "min": 3.0, "max": 3.0}
    assert high["steps_until"] is None


def test_steps_until_a_perplexity_lie_between_two_checkpoints(api: Api, sweep: dict[str, Any]) -> None:
    reached = [job["steps_until"] for job in compare(api, sweep=sweep["id"], perplexity=2)["jobs"]]
    assert [found and (found["step"], found["after_step"]) for found in reached] == [None, (3, 0), None, None]
    assert reached[1]["seconds"] > 0
    assert all(job["steps_until"] is None for job in compare(api, sweep=sweep["id"])["jobs"])


def test_the_series_are_read_at_a_step(api: Api, sweep: dict[str, Any]) -> None:
    found = compare(api, sweep=sweep["id"], at="step:200")
    figures = {"train_loss": 10 / 200, "lr": 1e-4, "grad_norm": 1.0}
    assert [job["at_step"] for job in found["jobs"]] == [None, None, figures, None]
    assert [group["at_step"] and group["at_step"]["train_loss"]["n"] for group in found["groups"]] == [None, 1]
    assert compare(api, sweep=sweep["id"], at="step:3")["groups"][0]["at_step"]["train_loss"]["n"] == 2


def test_the_metrics_asked_for_are_compared(api: Api) -> None:
    claim = api.running()
    mean = {"load_cv": 0.5}
    api.record_checkpoint(claim, 25, 1, accuracy=0.75, moe={"layers": [], "mean": mean, "max": mean})
    found = compare(api, job=[claim.job_id], metric=["moe.load_cv", "tok_per_sec"], best="accuracy")
    assert found["metrics"] == ["moe.load_cv", "tok_per_sec", "accuracy"]
    quarters = found["jobs"][0]["quarters"]
    assert [one["metrics"] for one in quarters] == [
        {"moe.load_cv": None, "tok_per_sec": None, "accuracy": 0.25},
        {"moe.load_cv": 0.5, "tok_per_sec": None, "accuracy": 0.75},
    ]
    assert (found["best"]["percent"], found["best"]["value"]) == (25, 0.75)  # the largest accuracy
    assert compare(api, job=[claim.job_id], metric="moe.load_cv")["best"]["value"] == 0.5  # the smallest


def test_jobs_are_found_by_name_and_by_tag(api: Api) -> None:
    ids = [api.submit(tags={"exam": "a"}, config=BYTES | {"dropout": rate})["id"] for rate in (0, 0.1)]
    other = api.submit(text="outro texto", tags={"exam": "b"}, config=BYTES)["id"]
    for query in ({"tag": "exam=a"}, {"job": ids[::-1] + ids}):
        assert [job["job_id"] for job in compare(api, **query)["jobs"]] == ids
    found = compare(api, tag="exam")
    assert [job["job_id"] for job in found["jobs"]] == [*ids, other]
    assert [one["name"] for one in found["parameters"]] == ["dropout", "text"]
    assert len(found["groups"]) == 3
    assert found["best"] is None
    assert compare(api, tag="nobody")["jobs"] == []


def test_as_csv_there_is_a_line_for_each_checkpoint(api: Api, sweep: dict[str, Any]) -> None:
    query = {"sweep": sweep["id"], "metric": ["loss"], "format": "csv", "perplexity": 2, "at": "step:3"}
    answer = api.http.get("/compare", params=query)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(answer.text.splitlines()))
    assert [(row["job_id"], row["percent"]) for row in rows] == list(
        zip([sweep["job_ids"][place] for place in (0, 0, 1, 1, 2, 3)], ["0", "100", "0", "100", "0", ""], strict=True)
    )
    assert {name: rows[3][name] for name in ("lr", "seed", "step", "loss", "steps_until")} == {
        "lr": "0.0001", "seed": "43", "step": "3", "loss": "0.5", "steps_until": "3",
    }  # fmt: skip
    assert list(rows[0])[-4:] == ["seconds_until", "train_loss_at_step", "lr_at_step", "grad_norm_at_step"]
    assert all(None not in row and None not in row.values() for row in rows)


def test_the_curves_of_all_are_read_as_envelopes(api: Api, sweep: dict[str, Any]) -> None:
    found = api.http.get("/compare/series", params={"sweep": sweep["id"], "points": 20}).json()["jobs"]
    assert [one["job_id"] for one in found] == sweep["job_ids"]
    assert found[0] == {
        "job_id": sweep["job_ids"][0], "bucket_steps": 1, "last_step": 3,
        "low": [10.0, 5.0, 3.3333], "high": [10.0, 5.0, 3.3333],
    }  # fmt: skip
    running = found[2]
    assert (running["bucket_steps"], running["last_step"]) == (32, 300)
    assert running["low"] == [float(f"{10 / min(32 * (b + 1), 300):.5g}") for b in range(10)]
    assert running["high"] == [float(f"{10 / (32 * b + 1):.5g}") for b in range(10)]
    assert (found[3]["last_step"], found[3]["low"]) == (0, [])
    whole = api.http.get("/compare/series", params={"job": sweep["job_ids"][2]}).json()["jobs"][0]
    assert (whole["bucket_steps"], len(whole["low"])) == (4, 75)


@pytest.mark.parametrize("path", ["/compare", "/compare/series"])
def test_what_cannot_be_compared_is_refused(api: Api, path: str) -> None:
    gone = api.submit()["id"]
    api.http.post(f"/jobs/{gone}/cancel")
    api.http.delete(f"/jobs/{gone}")
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({}, 422, "invalid_request"),
        ({"sweep": NOBODY, "tag": "a"}, 422, "invalid_request"),
        ({"job": [NOBODY] * 101}, 422, "invalid_request"),
        ({"job": [""]}, 422, "invalid_request"),
        ({"job": ["x"]}, 404, "job_not_found"),
        ({"tag": "a b"}, 422, "invalid_request"),
        ({"sweep": NOBODY}, 404, "sweep_not_found"),
        ({"job": [gone]}, 404, "job_not_found"),
        ({"job": [NOBODY, gone]}, 404, "job_not_found"),
    ]
    for query, status, code in refused:
        answer = api.http.get(path, params=query)
        assert (answer.status_code, answer.json()["code"]) == (status, code), query


def test_a_metric_that_is_none_is_refused_by_name(api: Api) -> None:
    for query in ({"metric": "los"}, {"best": "moe.loss"}, {"at": "200"}, {"perplexity": "nan"}, {"format": "xml"}):
        answer = api.http.get("/compare", params={"tag": "a"} | query)
        assert (answer.status_code, answer.json()["errors"][0]["loc"][1]) == (422, next(iter(query))), answer.text


def test_more_jobs_than_can_be_read_are_refused(serve: Serve) -> None:
    api = serve()
    values = [number / 1001 for number in range(1, 1001)]
    request = {"text": TEXT, "tags": {"t": "1"}, "config": BYTES, "grid": {"dropout": values}}
    made = api.http.post("/sweeps", json=request).json()
    assert len(compare(api, tag="t")["jobs"]) == len(made["job_ids"]) == 1000
    api.submit(tags={"t": "1"})
    answer = api.http.get("/compare", params={"tag": "t"})
    assert (answer.status_code, answer.json()["code"]) == (422, "too_many_jobs")


def test_a_comparison_is_one_file_that_a_browser_saves(api: Api, sweep: dict[str, Any]) -> None:
    answer = api.http.get("/compare", params={"sweep": sweep["id"], "format": "html", "lang": "pt"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="comparison.html"'
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "Perda de treino por passo" in answer.text
    assert all(job_id in answer.text for job_id in sweep["job_ids"])
    shortened = api.http.get("/compare", params={"sweep": sweep["id"][:-1], "format": "html", "lang": "pt"})
    assert shortened.text == answer.text
