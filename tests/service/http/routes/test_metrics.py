"""Metrics, thinned and whole, through a real server."""

import csv
import io

import pytest

from service.jobs import recording
from service.jobs.tables import SERIES
from tests.api import Api


def test_metrics_hold_each_checkpoint_and_the_steps(api: Api) -> None:
    claim = api.running()
    answer = api.http.get(f"/jobs/{claim.job_id}/metrics").json()
    assert answer["job_id"] == claim.job_id
    assert answer["status"] == "running"
    assert answer["steps"] == {"step": [1, 2, 3], "train_loss": [10.0, 5.0, 10 / 3], "lr": [1e-4] * 3,
                               "grad_norm": [1.0] * 3}  # fmt: skip
    (checkpoint,) = answer["checkpoints"]
    assert (checkpoint["percent"], checkpoint["step"], checkpoint["loss"]) == (0, 0, 2.0)
    assert checkpoint["train_loss"] is None
    assert checkpoint["moe"] is None
    assert checkpoint["baselines"]["unigram"] == 3.0
    assert checkpoint["continuation"] == {"prompt": "abc", "text": "def"}
    assert checkpoint["reconstruction"]["tokens"][0] == {  # as an earlier version recorded it, without the input
        "input": None, "target": "b", "predicted": "a", "loss": 0.5, "id": 98, "byte_offset": 1, "experts": None
    }  # fmt: skip


def test_the_tokens_may_be_left_out(api: Api) -> None:
    claim = api.running()
    (checkpoint,) = api.http.get(f"/jobs/{claim.job_id}/metrics", params={"tokens": False}).json()["checkpoints"]
    assert checkpoint["reconstruction"] == {"text": "aaaaaaaaa", "tokens": None, "truncated": False}


def test_a_thinned_series_keeps_its_extremes(api: Api) -> None:
    claim = api.running()
    api.record_steps(claim, 4, 5000)
    extreme = {"step": [5001], "train_loss": [99.0], "lr": [1e-4], "grad_norm": [float("nan")]}
    recording.record_steps(api.db, claim, extreme)
    api.record_steps(claim, 5002, 6000)
    steps = api.http.get(f"/jobs/{claim.job_id}/metrics", params={"points": 50}).json()["steps"]
    assert len(steps["step"]) <= 50
    assert (steps["step"][0], steps["step"][-1]) == (1, 6000)
    spike = steps["step"].index(5001)
    assert steps["train_loss"][spike] == 99.0
    assert steps["grad_norm"][spike] is None


def test_the_csv_is_the_complete_series(api: Api) -> None:
    claim = api.running()
    api.record_steps(claim, 4, 25_000)
    recording.record_steps(
        api.db, claim, {"step": [25_001], "train_loss": [float("inf")], "lr": [1e-4], "grad_norm": [2.0]}
    )
    answer = api.http.get(f"/jobs/{claim.job_id}/metrics.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    header, *rows = csv.reader(io.StringIO(answer.text))
    assert header == ["step", *SERIES]
    assert [int(row[0]) for row in rows] == list(range(1, 25_002))
    assert float(rows[6][1]) == 10 / 7
    assert rows[-1] == ["25001", "", "0.0001", "2.0"]


@pytest.mark.parametrize("params", [{"points": 0}, {"points": 10**9}, {"points": "x"}, {"tokens": "x"}, {"point": 5}])
def test_a_bad_query_is_refused(api: Api, params: dict[str, str]) -> None:
    answer = api.http.get(f"/jobs/{api.submit()['id']}/metrics", params=params)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
