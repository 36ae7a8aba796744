"""Changing, stopping, resuming and deleting jobs, through a real server."""

from uuid import uuid4

import pytest

from service.storage.job_folders import job_folder
from tests.api import Api
from tests.service.http.routes.problem_code import code


def test_a_patch_changes_what_it_names_and_nothing_else(api: Api) -> None:
    job = api.submit(name="old", tags={"a": "b"})
    where = f"/jobs/{job['id']}"
    assert api.http.patch(where, json={}).json()["name"] == "old"
    renamed = api.http.patch(where, json={"name": "new"}).json()
    assert (renamed["name"], renamed["tags"]) == ("new", {"a": "b"})
    tagged = api.http.patch(where, json={"tags": {"c": ""}}).json()
    assert (tagged["name"], tagged["tags"]) == ("new", {"c": ""})
    assert api.http.patch(where, json={"name": None}).json()["name"] is None
    assert api.http.get(where).json()["config"] == job["config"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'{"status": "succeeded"}', 422), (b'{"name": ""}', 422), (b'{"name": "\\ud800"}', 422), (b"{", 400),
     (b'{"tags": {"a": NaN}}', 422), (b"[" * 100_000, 400), (b'{"tags": null}', 422), (b"", 422)],
)  # fmt: skip
def test_a_bad_patch_is_refused(api: Api, body: bytes, status: int) -> None:
    job = api.submit(name="old")
    answer = api.http.patch(f"/jobs/{job['id']}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert code(answer) in {"invalid_body", "invalid_request"}
    assert api.http.get(f"/jobs/{job['id']}").json()["name"] == "old"


def test_cancel_pause_and_resume_take_effect_and_are_idempotent(api: Api) -> None:
    where = f"/jobs/{api.submit()['id']}"
    for wish, status in [("pause", "paused"), ("pause", "paused"), ("resume", "queued"), ("resume", "queued"),
                         ("cancel", "cancelled"), ("cancel", "cancelled")]:  # fmt: skip
        answer = api.http.post(f"{where}/{wish}")
        assert (answer.status_code, answer.json()["status"]) == (202, status)


def test_a_request_to_stop_an_ended_job_is_a_conflict(api: Api) -> None:
    where = f"/jobs/{api.finished()}"
    for wish, expected in [("cancel", "not_cancellable"), ("pause", "not_pausable"), ("resume", "not_resumable")]:
        answer = api.http.post(f"{where}/{wish}")
        assert (answer.status_code, code(answer)) == (409, expected)


def test_a_finished_job_is_deleted_with_its_files_and_its_text(api: Api) -> None:
    text = f"só meu {uuid4().hex}"
    job_id = api.finished(text=text)
    folder = api.context.settings.data_dir / job_folder(job_id)
    assert folder.is_dir()
    assert api.http.delete(f"/jobs/{job_id}").status_code == 204
    assert not folder.exists()
    assert code(api.http.get(f"/jobs/{job_id}")) == "job_not_found"
    assert code(api.http.delete(f"/jobs/{job_id}")) == "job_not_found"


def test_a_job_that_is_not_finished_or_has_children_is_not_deleted(api: Api) -> None:
    answer = api.http.delete(f"/jobs/{api.submit()['id']}")
    assert (answer.status_code, code(answer)) == (409, "job_not_finished")
    parent = api.finished()
    child = api.submit(config={"tokenizer": "bytes", "init_from": {"job_id": parent}})
    assert child["parent"] == {"job_id": parent, "checkpoint": 100}
    answer = api.http.delete(f"/jobs/{parent}")
    assert (answer.status_code, code(answer)) == (409, "has_dependents")
