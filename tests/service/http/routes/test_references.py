"""Jobs named by their name and by the beginning of their id, in paths and in bodies."""

from pathlib import Path
from uuid import uuid4

import pytest

from service.jobs import queue
from tests.api import TEXT, Api
from tests.service.http.routes.problem_code import code
from tests.service.tiny_checkpoint import tiny_files


@pytest.fixture
def named(api: Api) -> tuple[str, str]:
    """The id and the name of a job that has finished."""
    name = f"gato à toa {uuid4().hex}"
    return api.finished(name=name), name


def unique_prefix(api: Api, job_id: str) -> str:
    ids = {job["id"] for job in api.http.get("/jobs", params={"limit": 200}).json()["data"]} - {job_id}
    return next(job_id[:n] for n in range(4, 32) if not any(other.startswith(job_id[:n]) for other in ids))


@pytest.mark.parametrize(
    "rest", ["", "/text", "/metrics", "/metrics.csv", "/events", "/checkpoints", "/checkpoints/latest",
             "/checkpoints/0/reconstruction", "/checkpoints/100/files/config.json"],
)  # fmt: skip
def test_every_route_of_a_job_takes_its_name_and_the_beginning_of_its_id(
    api: Api, named: tuple[str, str], rest: str
) -> None:
    job_id, name = named
    by_id = api.http.get(f"/jobs/{job_id}{rest}")
    for reference in (name, unique_prefix(api, job_id)):
        answer = api.http.get(f"/jobs/{reference}{rest}")
        assert (answer.status_code, answer.content) == (by_id.status_code, by_id.content)


def test_a_job_is_changed_and_deleted_by_its_name(api: Api, named: tuple[str, str]) -> None:
    job_id, name = named
    assert api.http.patch(f"/jobs/{name}", json={"tags": {"a": "b"}}).json()["id"] == job_id
    assert code(api.http.post(f"/jobs/{name}/cancel")) == "not_cancellable"
    assert api.http.delete(f"/jobs/{name}").status_code == 204
    assert code(api.http.delete(f"/jobs/{name}")) == "job_not_found"
    assert code(api.http.get(f"/jobs/{job_id}")) == "job_not_found"


@pytest.mark.parametrize("request_", ["DELETE ", "POST /cancel", "POST /pause", "GET ", "GET /metrics", "GET /events"])
def test_an_ambiguous_name_is_refused_with_the_jobs_that_it_may_mean(
    api: Api, named: tuple[str, str], request_: str
) -> None:
    job_id, name = named
    other = api.submit(name=name)
    method, rest = request_.split(" ")
    answer = api.http.request(method, f"/jobs/{name}{rest}")
    assert (answer.status_code, code(answer)) == (409, "ambiguous_job")
    assert [(one["id"], one["name"], one["status"]) for one in answer.json()["candidates"]] == [
        (other["id"], name, "queued"),
        (job_id, name, "succeeded"),
    ]
    assert answer.json()["candidates"][0]["created_at"] == other["created_at"]
    for one, status in ((other["id"], "queued"), (job_id, "succeeded")):
        assert api.http.get(f"/jobs/{one}").json()["status"] == status
    api.http.post(f"/jobs/{other['id']}/cancel")


def test_a_name_that_is_the_beginning_of_another_id_is_read_but_not_deleted(api: Api, named: tuple[str, str]) -> None:
    job_id, _ = named
    prefix = unique_prefix(api, job_id)
    other = api.finished(name=prefix)
    assert api.http.get(f"/jobs/{prefix}").json()["id"] == other
    for answer in (api.http.delete(f"/jobs/{prefix}"), api.http.post(f"/jobs/{prefix}/cancel")):
        assert (answer.status_code, code(answer)) == (409, "ambiguous_job")


def test_a_parent_is_named_and_its_id_is_kept(api: Api, named: tuple[str, str]) -> None:
    job_id, name = named
    for find in (lambda: name, lambda: unique_prefix(api, job_id)):
        child = api.submit(config={"tokenizer": "bytes", "init_from": {"job_id": find()}})
        assert child["parent"] == {"job_id": job_id, "checkpoint": 100}
        assert child["config"]["init_from"]["job_id"] == job_id
    sweep = api.submit_sweep(config={"tokenizer": "bytes", "init_from": {"job_id": name}})
    of_sweep = [api.http.get(f"/jobs/{one}").json()["config"]["init_from"]["job_id"] for one in sweep["job_ids"]]
    assert of_sweep == [job_id, job_id]
    api.submit(name=name)
    answer = api.http.post("/jobs", json={"text": TEXT, "config": {"init_from": {"job_id": name}}})
    assert (answer.status_code, code(answer)) == (409, "ambiguous_job")


@pytest.mark.parametrize("path", ["/compare", "/compare/series"])
def test_jobs_are_compared_by_name(api: Api, named: tuple[str, str], path: str) -> None:
    job_id, name = named
    other = api.finished()
    for mine in (name, unique_prefix(api, job_id)):
        answer = api.http.get(path, params={"job": [mine, other, job_id]})
        assert [job.get("id") or job["job_id"] for job in answer.json()["jobs"]] == [job_id, other]
    api.finished(name=name)
    answer = api.http.get(path, params={"job": [other, name]})
    assert (answer.status_code, code(answer)) == (409, "ambiguous_job")


def test_a_checkpoint_is_named_by_its_job(api: Api, tmp_path: Path) -> None:
    name = f"rato {uuid4().hex}"
    claim = api.claim(api.submit(name=name)["id"])
    api.record_checkpoint(claim, 25, 3, tiny_files(tmp_path / "tiny"))
    queue.finish(api.db, claim, "succeeded")
    asked = {"job_id": name, "checkpoint": 25}
    for path, body in (
        ("/generate", {"prompt": "Era", "max_new_tokens": 1}),
        ("/score", {"text": "Era uma"}),
        ("/inspect", {"prompt": "Era"}),
    ):
        answer = api.http.post(path, json=asked | body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["job_id"] == claim.job_id
    for model in (name, f"{name}@25"):
        assert api.http.get(f"/v1/models/{model}").json()["id"] == f"{claim.job_id}@25"
    completed = api.http.post("/v1/completions", json={"model": f"{name}@25", "prompt": "Era", "max_tokens": 1})
    assert completed.json()["model"] == f"{claim.job_id}@25"
    api.submit(name=name)
    for path, body in (("/generate", {"prompt": "Era"}), ("/score", {"text": "ab"}), ("/inspect", {"prompt": "a"})):
        answer = api.http.post(path, json=asked | body)
        assert (answer.status_code, code(answer)) == (409, "ambiguous_job")
    refused = api.http.post("/v1/completions", json={"model": name, "prompt": "Era"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "ambiguous_job")
    assert claim.job_id in refused.json()["error"]["message"]


@pytest.fixture
def swept(api: Api) -> tuple[str, str]:
    """The id and the name of a sweep all of whose jobs have finished."""
    name = f"varredura à toa {uuid4().hex}"
    return api.submit_finished_sweep(name=name), name


def test_every_route_of_a_sweep_takes_its_name_and_the_beginning_of_its_id(api: Api, swept: tuple[str, str]) -> None:
    sweep_id, name = swept
    others = {sweep["id"] for sweep in api.http.get("/sweeps").json()["data"]} - {sweep_id}
    prefix = next(sweep_id[:n] for n in range(4, 32) if not any(other.startswith(sweep_id[:n]) for other in others))
    for path in ("/sweeps/{}", "/sweeps/{}/events", "/compare?sweep={}", "/compare/series?sweep={}"):
        by_id = api.http.get(path.format(sweep_id))
        assert by_id.status_code == 200
        for reference in (name, prefix):
            assert api.http.get(path.format(reference)).content == by_id.content
    assert code(api.http.post(f"/sweeps/{name}/pause")) == "not_pausable"
    assert api.http.delete(f"/sweeps/{name}").status_code == 204
    for path in (f"/sweeps/{name}", f"/compare?sweep={name}", "/sweeps/%2e%2e", "/sweeps/019"):
        assert code(api.http.get(path)) == "sweep_not_found"


def test_an_ambiguous_sweep_is_refused_with_those_that_it_may_mean(api: Api, swept: tuple[str, str]) -> None:
    sweep_id, name = swept
    other = api.submit_sweep(name=name)
    for method, path in (("DELETE", f"/sweeps/{name}"), ("GET", f"/compare?sweep={name}")):
        answer = api.http.request(method, path)
        assert (answer.status_code, code(answer)) == (409, "ambiguous_sweep")
        assert [(one["id"], one["name"], one["status"]) for one in answer.json()["candidates"]] == [
            (other["id"], name, "queued"),
            (sweep_id, name, "succeeded"),
        ]
    api.http.post(f"/sweeps/{other['id']}/cancel")


def test_jobs_are_listed_by_name_and_by_the_beginning_of_their_id(api: Api, named: tuple[str, str]) -> None:
    job_id, name = named
    other = api.submit(name=name, tags={"a": "b"})["id"]

    def listed(**query: str) -> list[str]:
        return [job["id"] for job in api.http.get("/jobs", params=query).json()["data"]]

    assert listed(name=name) == [other, job_id]
    assert listed(name=name, tag="a=b") == listed(id_prefix=other) == [other]
    assert listed(name=name, id_prefix=unique_prefix(api, job_id)) == [job_id]
    assert listed(name=name[:-1]) == listed(id_prefix="f") == []
    assert {job_id, other} <= set(listed(id_prefix=job_id[:1], limit="200"))
    for query, said in (({"id_prefix": "G"}, "first digits of an id"), ({"id_prefix": ""}, "first digits of an id"),
                        ({"name": "\n"}, "control characters")):  # fmt: skip
        answer = api.http.get("/jobs", params=query)
        assert (answer.status_code, code(answer)) == (422, "invalid_request")
        assert said in answer.json()["detail"]
    api.http.post(f"/jobs/{other}/cancel")


def test_a_job_has_its_newest_figures_in_a_list_and_alone(api: Api, named: tuple[str, str]) -> None:
    job_id, name = named
    alone, (listed,) = (
        api.http.get(f"/jobs/{job_id}").json(),
        api.http.get("/jobs", params={"name": name}).json()["data"],
    )
    assert alone["figures"] == listed["figures"] == {"percent": 100, "loss": 2.0, "perplexity": 7.389}
    assert api.http.get(f"/jobs/{api.submit()['id']}").json()["figures"] is None
