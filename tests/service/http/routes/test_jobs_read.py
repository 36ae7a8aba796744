"""Listing and reading jobs, through a real server."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from nanomoe.config import JobConfig
from service.jobs import queue
from service.jobs.new_job import NewJob
from service.jobs.statuses import STATUSES
from service.jobs.submit import submit_job
from service.jobs.workers import worker_started
from tests.api import TEXT, Api, Serve, serving
from tests.service.http.routes.problem_code import code

NOBODY = "0" * 32


def test_pages_do_not_shift_when_jobs_arrive(api: Api) -> None:
    tag = uuid4().hex
    ids = [api.submit(tags={"page": tag})["id"] for _ in range(5)]
    first = api.http.get("/jobs", params={"tag": f"page:{tag}", "limit": 2}).json()
    api.submit(tags={"page": tag})
    params = {"tag": f"page:{tag}", "limit": 2, "cursor": first["next_cursor"]}
    second = api.http.get("/jobs", params=params).json()
    third = api.http.get("/jobs", params=params | {"cursor": second["next_cursor"]}).json()
    assert [job["id"] for page in (first, second, third) for job in page["data"]] == ids[::-1]
    assert third["next_cursor"] is None


def test_a_list_is_filtered_by_status_and_by_tag(api: Api) -> None:
    key = f"k{uuid4().hex}"
    done, waiting = api.finished(tags={key: "a"}), api.submit(tags={key: "b:c"})["id"]

    def found(**params: str) -> set[str]:
        return {job["id"] for job in api.http.get("/jobs", params=params).json()["data"]}

    assert found(tag=key) == {done, waiting}
    assert found(tag=f"{key}:b:c") == found(tag=f"{key}=b:c") == {waiting}
    assert found(tag=key, status="succeeded") == {done}
    assert found(tag=f"{key}:nope") == set()
    assert found(q=done) == {done}
    counted = api.http.get("/jobs", params={"tag": key, "status": "queued", "counts": True}).json()["counts"]
    assert counted == dict.fromkeys(STATUSES, 0) | {"succeeded": 1, "queued": 1}


@pytest.mark.parametrize(
    "params", [{"limit": 0}, {"limit": "x"}, {"limit": 10**30}, {"status": "nope"}, {"cursor": "x"}, {"tag": 'a"b'},
               {"cursor": NOBODY}, {"cursor": 10**18}, {"limits": 1}, {"tag": "a:\0"}, {"tag": "a=\0"}, {"tag": "=a"}]
)  # fmt: skip
def test_a_bad_filter_is_refused(api: Api, params: dict[str, Any]) -> None:
    answer = api.http.get("/jobs", params=params)
    assert (answer.status_code, code(answer)) == (422, "invalid_request")


@pytest.mark.parametrize(
    "job_id", [NOBODY, "x", "%00", "%ff", "..%2f..%2fetc", "A" * 32, "0" * 33, "a" * 5000, "%F0%9F%90%88", " " * 3]
)
@pytest.mark.parametrize("rest", ["", "/text", "/metrics", "/metrics.csv", "/events", "/checkpoints/latest"])
def test_an_unknown_id_is_not_found(api: Api, job_id: str, rest: str) -> None:
    answer = api.http.get(f"/jobs/{job_id}{rest}")
    assert answer.status_code == 404
    assert code(answer) in {"job_not_found", "not_found"}


def test_a_queued_job_has_its_queue_position(serve: Serve) -> None:
    api = serve()
    first, second = api.submit(), api.submit()
    assert api.http.get(f"/jobs/{first['id']}").json()["queue_position"] == 0
    assert api.http.get(f"/jobs/{second['id']}").json()["queue_position"] == 1
    api.claim(second["id"])
    assert api.http.get(f"/jobs/{second['id']}").json()["queue_position"] is None


def test_the_text_comes_back_byte_for_byte(api: Api) -> None:
    text = "linha\r\n\ttab\0nul 🐈‍⬛ \u2028 fim"
    answer = api.http.get(f"/jobs/{api.submit(text=text)['id']}/text")
    assert answer.content == text.encode()
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_a_row_of_an_earlier_version_says_no_more_that_a_dense_job_has_unused_settings(api: Api) -> None:
    false = {"code": "moe_settings_unused", "message": "use_moe is false, so these do nothing: all thirteen"}
    other = {"code": "dead_expert", "message": "expert 3"}
    warnings: dict[str, list[dict[str, str]]] = {}
    for name, config in {"default": {}, "changed": {"n_experts": 4}}.items():
        new = NewJob(
            text=TEXT, config=JobConfig.model_validate(config).model_dump(mode="json"), warnings=[false, other]
        )
        job, _ = submit_job(api.db, new)
        warnings[name] = api.http.get(f"/jobs/{job.id}").json()["warnings"]
    assert warnings["default"] == [other]
    assert warnings["changed"] == [
        {"code": "moe_settings_unused", "message": "use_moe is false, so these do nothing: n_experts"},
        other,
    ]


def test_a_job_is_not_claimed_before_its_run_at(serve: Serve) -> None:
    api = serve()
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    job = api.submit(run_at=tomorrow.isoformat())
    assert datetime.fromisoformat(job["run_at"]) == tomorrow
    assert queue.claim(api.db, api.worker, 60) is None


def test_both_databases_give_the_same_answers(settings: Any) -> None:
    with serving(settings.model_copy(update={"port": 0})) as api:
        tags = {"k": "v:w"}
        job_id = api.submit(text="nul \0 e gato", name="gato", tags=tags)["id"]
        assert [job["id"] for job in api.http.get("/jobs", params={"tag": "k:v:w"}).json()["data"]] == [job_id]
        assert api.http.get("/jobs", params={"tag": "k"}).json()["data"][0]["tags"] == tags
        assert api.http.get(f"/jobs/{job_id}/text").content == b"nul \0 e gato"
        assert code(api.http.get("/jobs/%00")) == "job_not_found"
        claim = api.claim(job_id)
        api.record_steps(claim, 1, 3)
        api.record_checkpoint(claim, 100, 3)
        queue.finish(api.db, claim, "succeeded")
        assert api.http.get(f"/jobs/{job_id}/metrics").json()["steps"]["step"] == [1, 2, 3]
        events = api.http.get(f"/jobs/{job_id}/events").text
        assert events.count("event: status") == 3
        assert api.http.delete(f"/jobs/{job_id}").status_code == 204


def test_a_queued_job_has_an_estimated_start(serve: Serve) -> None:
    api = serve()
    assert api.submit()["estimated_start_at"] is None  # there is no worker
    worker_started(api.db, api.worker)
    claim = api.running()
    assert api.http.get(f"/jobs/{claim.job_id}").json()["estimated_start_at"] is None
    waiting = api.submit(priority=1)  # before the first, which was paused
    expected = datetime.fromisoformat(waiting["created_at"]) + timedelta(seconds=5)  # what the running one still needs
    assert abs(datetime.fromisoformat(waiting["estimated_start_at"]) - expected) < timedelta(seconds=60)
    assert api.http.get(f"/jobs/{waiting['id']}").json()["queue_position"] == 0
    assert api.http.get("/jobs").json()["data"][0]["estimated_start_at"] is None


def test_a_job_says_with_how_many_it_was_claimed(serve: Serve) -> None:
    api = serve()
    ids = [api.submit(config={"lr": lr})["id"] for lr in (1e-3, 5e-3)]
    assert api.http.get(f"/jobs/{ids[0]}").json()["cohort"] is None
    (claimed,) = queue.claim_cohorts(api.db, api.worker, 60, 1, 8)
    assert [claim.job_id for claim in claimed] == ids
    found = [api.http.get(f"/jobs/{job_id}").json()["cohort"] for job_id in ids]
    assert found == [{"id": claimed[0].job.cohort_id, "size": 2}] * 2
