"""Who is answered what: every route and method of the app, without a key, with a viewer's, another member's, the
owner's and an admin's."""

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import Mount

from service.access.keys import create_key, revoke_key
from service.access.roles import ROLES, Role
from service.app import create_app
from service.http.authentication import SlowDown
from service.http.permissions import PERMISSIONS
from service.jobs import queue
from service.settings import Settings
from tests.api import TEXT, Api, Serve

ASKERS: Mapping[str, tuple[str, Role]] = {
    "viewer": ("ana", "viewer"),
    "another": ("rui", "member"),
    "member": ("ana", "member"),
    "admin": ("root", "admin"),
}
"""Owner and role of each key; the jobs are ana's."""

TABLE = (Path(__file__).parent / "access_table.txt").read_text("utf-8")
"""Route, and the answers without a key, to a viewer, to another member, to the owner, to an admin."""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of every route, those that the OpenAPI document leaves out, too."""
    routes: list[Any] = list(app.routes)
    while routes:
        route = routes.pop()
        if (router := getattr(route, "original_router", None)) is not None:
            routes += router.routes
        elif isinstance(route, Mount):
            yield "GET", route.path
        else:
            yield from ((method, route.path) for method in route.methods if method != "HEAD")


async def at_once(seconds: float) -> None:
    """No sleep: many a wrong key is sent here."""


@pytest.fixture(scope="module")
def keys(api: Api) -> dict[str, str]:
    """The key of each asker. From here on, the API is asked as the member does."""
    api.context.authenticator._slow_down = SlowDown(sleep=at_once)
    made = {asker: create_key(api.db, owner, role).key for asker, (owner, role) in ASKERS.items()}
    api.http.headers["Authorization"] = f"Bearer {made['member']}"
    return made


@pytest.fixture(scope="module")
def things(api: Api, keys: dict[str, str]) -> dict[str, str]:
    """Ana's jobs and sweeps by state."""
    sweep = api.submit_finished_sweep()
    finished = api.finished(name="gato")
    waiting = api.submit_sweep()
    return {
        "finished": finished,
        "queued": api.submit()["id"],
        "finished_sweep": sweep,
        "queued_sweep": waiting["id"],
    }


def requests_of(things: dict[str, str]) -> dict[tuple[str, str], tuple[str, Any]]:
    """Path and body of a request to each route, which the owner gets an answer to before any model is run, and which
    leaves everything as it is."""
    finished, queued = f"/jobs/{things['finished']}", f"/jobs/{things['queued']}"
    not_recorded = {"job_id": things["finished"], "checkpoint": 25}
    given: dict[tuple[str, str], tuple[str, Any]] = {
        ("POST", "/jobs"): ("/jobs?dry_run=true", {"text": TEXT}),
        ("POST", "/sweeps"): ("/sweeps?dry_run=true", {"text": TEXT, "seeds": 2}),
        ("PATCH", "/jobs/{job_id}"): (finished, {"name": "gato"}),
        ("DELETE", "/jobs/{job_id}"): (queued, None),
        ("GET", "/jobs/{job_id}/checkpoints/{percent}/files/{name}"): (
            f"{finished}/checkpoints/0/files/config.json",
            None,
        ),
        ("DELETE", "/sweeps/{sweep_id}"): (f"/sweeps/{things['queued_sweep']}", None),
        ("GET", "/compare"): (f"/compare?sweep={things['finished_sweep']}", None),
        ("GET", "/compare/series"): (f"/compare/series?job={things['finished']}", None),
        ("GET", "/v1/models/{model}"): (f"/v1/models/{things['finished']}", None),
        ("POST", "/generate"): ("/generate", {**not_recorded, "prompt": "a"}),
        ("POST", "/score"): ("/score", {**not_recorded, "text": "ab"}),
        ("POST", "/inspect"): ("/inspect", {**not_recorded, "prompt": "a"}),
        ("POST", "/v1/completions"): ("/v1/completions", {"model": f"{things['finished']}@25", "prompt": "a"}),
        ("GET", "/static"): ("/static/vendor/README.md", None),
        ("GET", "/page/{view:path}"): ("/page/jobs", None),
        ("POST", "/session"): ("/session", {"key": "wrong"}),
    }
    filled = {"job_id": things["finished"], "sweep_id": things["finished_sweep"], "percent": "0", "name": "config.json"}
    return {route: given[route] if route in given else (route[1].format(**filled), None) for route in PERMISSIONS}


def answer_to(api: Api, key: str | None, method: str, path: str, body: Any) -> str:
    """Status and code of the answer."""
    headers = {"Authorization": "" if key is None else f"Bearer {key}"}
    with api.http.stream(method, path, json=body, headers=headers) as answer:
        if not (path == "/events" and answer.is_success):  # which never ends
            answer.read()
    if answer.status_code == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")
    if answer.status_code < 400:
        return str(answer.status_code)
    found = answer.json()
    return f"{answer.status_code} {found['code'] if 'code' in found else found['error']['code']}"


def test_every_route_of_the_app_has_a_permission(tmp_path: Path) -> None:
    app = create_app(Settings(_env_file=None, data_dir=tmp_path))
    assert set(routes_of(app)) == set(PERMISSIONS)


def test_every_route_answers_each_role_as_written(api: Api, keys: dict[str, str], things: dict[str, str]) -> None:
    made = [" | ".join(["route", "without a key", *ASKERS])]
    for (method, route), (path, body) in requests_of(things).items():
        answers = [answer_to(api, key, method, path, body) for key in (None, *keys.values())]
        made.append(" | ".join([f"{method} {route}", *answers]))
    assert made == [re.sub(r" +\| ", " | ", line).strip() for line in TABLE.splitlines()]


def ask(api: Api, key: str, path: str, **query: Any) -> Any:
    answer = api.http.get(path, params=query, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_lists_show_the_own_jobs_and_an_admin_all(api: Api, keys: dict[str, str], things: dict[str, str]) -> None:
    assert {job["id"] for job in ask(api, keys["member"], "/jobs")["data"]} > {things["finished"], things["queued"]}
    assert ask(api, keys["viewer"], "/jobs") == ask(api, keys["member"], "/jobs") == ask(api, keys["admin"], "/jobs")
    for path, query in [
        ("/jobs", {}),
        ("/jobs", {"tag": "sweep"}),
        ("/sweeps", {}),
        ("/v1/models", {}),
        ("/compare/series", {"tag": "sweep"}),
    ]:
        (shown,) = (found for found in ask(api, keys["member"], path, **query).values() if isinstance(found, list))
        assert shown, path
        (hidden,) = (found for found in ask(api, keys["another"], path, **query).values() if isinstance(found, list))
        assert hidden == [], path
    assert ask(api, keys["another"], "/compare", tag="sweep")["jobs"] == []


def test_a_name_and_the_beginning_of_an_id_mean_the_own_jobs_only(
    api: Api, keys: dict[str, str], things: dict[str, str]
) -> None:
    own = api.http.post("/jobs", json={"text": TEXT, "name": "gato"}, headers=bearer(keys["another"])).json()["id"]
    assert ask(api, keys["another"], "/jobs/gato")["id"] == own
    assert ask(api, keys["member"], "/jobs/gato")["id"] == things["finished"]
    assert api.http.get("/jobs/gato", headers=bearer(keys["admin"])).json()["code"] == "ambiguous_job"
    for path in ("/jobs/", "/v1/models/"):
        shortened = api.http.get(path + things["finished"][:20], headers=bearer(keys["another"]))
        assert shortened.status_code == 404


def test_a_job_cannot_start_from_anothers(api: Api, keys: dict[str, str], things: dict[str, str]) -> None:
    config = {"init_from": {"job_id": things["finished"]}, "tokenizer": "bytes"}
    for path, changes in (("/jobs", {}), ("/sweeps", {"seeds": 2})):
        body = {"text": TEXT, "config": config} | changes
        answer = api.http.post(path, json=body, headers=bearer(keys["another"]))
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


def test_jobs_from_before_there_were_keys_are_the_admins(serve: Serve) -> None:
    api = serve()
    old = api.submit(name="old")["id"]
    keys = {role: create_key(api.db, role, role).key for role in ROLES}
    # First with a key, at which the service looks for keys at once; without one it may take it a second.
    assert ask(api, keys["admin"], "/jobs/old")["id"] == old
    assert api.http.get(f"/jobs/{old}").json()["code"] == "key_required"
    for role in ("member", "viewer"):
        assert api.http.get(f"/jobs/{old}", headers=bearer(keys[role])).json()["code"] == "job_not_found"


def status_of_raw(api: Api, path: str) -> int:
    """Status of a GET without a key for a path as it is, which httpx would put in order."""
    with closing(HTTPConnection(api.http.base_url.host, api.http.base_url.port)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


def test_what_is_in_no_table_is_only_there_for_an_admin(api: Api, keys: dict[str, str]) -> None:
    for asker, unknown, wrong_method in [("member", 404, 403), ("admin", 404, 405)]:
        assert api.http.get("/nope", headers=bearer(keys[asker])).status_code == unknown
        assert api.http.put("/jobs", headers=bearer(keys[asker])).status_code == wrong_method
        assert api.http.options("/jobs", headers=bearer(keys[asker])).headers["allow"] == "GET, HEAD, OPTIONS, POST"
    for method, path in [("GET", "/nope"), ("PUT", "/jobs"), ("OPTIONS", "/jobs"), ("HEAD", "/jobs")]:
        assert api.http.request(method, path, headers={"Authorization": ""}).status_code == 401
    for path in ("/jobs%0a", "//jobs", "/static/../jobs", "/static%2f..%2fjobs", "/JOBS", "/jobs/", "/healthz/../jobs"):
        assert status_of_raw(api, path) in (401, 404), path


def test_a_key_works_as_openais_client_sends_it_and_its_errors_have_that_shape(
    api: Api, keys: dict[str, str], things: dict[str, str]
) -> None:
    wrong = api.http.get("/v1/models", headers=bearer("sk-wrong"))
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "key_invalid")
    assert wrong.headers["www-authenticate"] == 'Bearer realm="nanomoe", error="invalid_token"'
    assert things["finished"] in {one["id"][:32] for one in ask(api, keys["viewer"], "/v1/models")["data"]}


@pytest.mark.parametrize("key", ["nmk_", "x" * 5000, "nmk_" + "A" * 43])
def test_a_wrong_key_is_refused_whatever_it_looks_like(api: Api, keys: dict[str, str], key: str) -> None:
    answer = api.http.get("/jobs", headers=bearer(key))
    assert (answer.status_code, answer.json()["code"]) == (401, "key_invalid")
    assert key not in answer.text


@pytest.mark.parametrize("header", ["Bearer", "bearer", "Basic YTpi", "Basic", "nmk_", "Token nmk_"])
def test_another_scheme_is_no_key(api: Api, keys: dict[str, str], header: str) -> None:
    answer = api.http.get("/jobs", headers={"Authorization": header})
    wanted = "key_invalid" if header.lower() == "bearer" else "key_required"
    assert (answer.status_code, answer.json()["code"]) == (401, wanted)


def test_a_revoked_key_ends_at_once_and_the_service_stays_closed(serve: Serve) -> None:
    api = serve()
    made = create_key(api.db, "ana", "admin")
    assert api.http.get("/jobs", headers=bearer(made.key)).status_code == 200
    revoke_key(api.db, made.id)
    assert api.http.get("/jobs", headers=bearer(made.key)).json()["code"] == "key_invalid"
    assert api.http.get("/jobs").json()["code"] == "key_required"


def test_without_any_key_nothing_is_asked_for_and_a_key_that_is_sent_is_not_looked_at(serve: Serve) -> None:
    api = serve()
    assert api.http.get("/workers", headers=bearer("none is needed")).status_code == 200
    assert api.http.get("/session").json() == {
        "key_required": False,
        "owner": None,
        "role": "admin",
        "quotas": [],
    }


@pytest.mark.parametrize("path", ["/events", "/jobs/{job}/events", "/sweeps/{sweep}/events"])
@pytest.mark.parametrize("has_key", [True, False])
def test_a_stream_of_events_ends_once_its_key_is_revoked_or_keys_are_asked_for(
    serve: Serve, path: str, has_key: bool
) -> None:
    api = serve()
    sweep = api.submit_sweep()
    made = create_key(api.db, "root", "admin") if has_key else None
    path = path.format(job=sweep["job_ids"][0], sweep=sweep["id"])
    with api.http.stream("GET", path, headers=bearer(made.key) if made else {}) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        if made:
            revoke_key(api.db, made.id)
        else:
            create_key(api.db, "root", "admin")
        queue.request_cancel_sweep(api.db, sweep["id"])
        assert "cancelled" not in "".join(lines)
