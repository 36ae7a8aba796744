"""The OpenAPI document against the API: each documented status of each route is reached, and no other."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from openapi_spec_validator import validate

from service.access.keys import create_key
from service.app import create_app
from service.client.calls import model_files
from service.errors import ServiceError, StorageFull, Unavailable
from service.http import openapi
from service.http.openapi import document
from service.jobs import queue
from service.settings import Settings
from tests.api import TEXT, Api, Serve
from tests.descriptions import stands_alone
from tests.nanomoe.foreign_models import gpt2, save_gpt2
from tests.races import at_once
from tests.service.tiny_checkpoint import tiny_files

NOBODY = "0" * 32
READ_ONLY = ("/generate", "/score", "/inspect", "/v1/completions")
SIGNED_IN = {"nanomoe_session": "token"}
JSON = {"content-type": "application/json"}

Reached = set[tuple[str, str, int]]


class Explorer:
    """Sends requests, and keeps which status each route answered."""

    def __init__(self, api: Api, templates: list[str]) -> None:
        self.api = api
        self.reached: Reached = set()
        self._routes = [(template, re.compile(re.sub(r"\{\w+\}", "[^/]+", template))) for template in templates]

    def send(self, method: str, path: str, **request: Any) -> None:
        with self.api.http.stream(method, path, **request) as answer:
            if path != "/events":  # which never ends
                answer.read()
        template = next(template for template, route in self._routes if route.fullmatch(path.partition("?")[0]))
        self.reached.add((method.lower(), template, answer.status_code))


@contextmanager
def failing(api: Api, error_code: int | None) -> Iterator[None]:
    """Every transaction fails: as when the server is away, or with an error code of SQLite's."""
    cause = Exception("injected")
    if error_code is not None:
        cause.sqlite_errorcode = error_code  # type: ignore[attr-defined]

    @sa.event.listens_for(api.db.engine, "begin")
    def refuse(connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("BEGIN", {}, cause)

    try:
        yield
    finally:
        sa.event.remove(api.db.engine, "begin", refuse)


def valid_requests(queued: str, finished: str, sweep: str) -> list[tuple[str, str, Any]]:
    """One legal request to each route, none of which needs another's effect."""
    generate = {"job_id": finished, "prompt": "a", "max_new_tokens": 1}
    return [
        ("POST", "/jobs", {"text": TEXT}),
        ("GET", "/jobs", None),
        ("GET", f"/jobs/{queued}", None),
        ("PATCH", f"/jobs/{queued}", {"name": "gato"}),
        ("GET", f"/jobs/{queued}/text", None),
        ("GET", f"/jobs/{queued}/metrics", None),
        ("GET", f"/jobs/{queued}/metrics.csv", None),
        ("GET", f"/jobs/{finished}/events", None),
        ("GET", f"/jobs/{finished}/checkpoints", None),
        ("GET", f"/jobs/{finished}/checkpoints/latest", None),
        ("GET", f"/jobs/{finished}/checkpoints/0/reconstruction", None),
        ("GET", f"/jobs/{finished}/checkpoints/0/files/config.json", None),
        ("POST", "/sweeps", {"text": TEXT, "seeds": 2}),
        ("GET", "/sweeps", None),
        ("GET", "/presets", None),
        ("GET", f"/sweeps/{sweep}", None),
        ("GET", f"/sweeps/{sweep}/events", None),
        ("GET", "/events", None),
        ("GET", f"/compare?sweep={sweep}", None),
        ("GET", f"/compare/series?sweep={sweep}", None),
        ("POST", "/generate", generate),
        ("POST", "/score", {"job_id": finished, "text": "ab"}),
        ("POST", "/inspect", {"job_id": finished, "prompt": "a"}),
        ("POST", "/v1/completions", {"model": finished, "prompt": "a", "max_tokens": 1}),
        ("GET", "/v1/models", None),
        ("GET", f"/v1/models/{finished}", None),
        ("GET", "/session", None),
        ("POST", "/session", {"key": "nmk_wrong"}),
        ("DELETE", "/session", None),
        ("GET", "/workers", None),
        ("GET", "/healthz", None),
        ("GET", "/readyz", None),
        ("GET", "/metrics", None),
        ("POST", f"/jobs/{queued}/pause", None),
        ("POST", f"/jobs/{queued}/resume", None),
        ("POST", f"/jobs/{queued}/cancel", None),
        ("DELETE", f"/jobs/{queued}", None),
        ("POST", f"/sweeps/{sweep}/pause", None),
        ("POST", f"/sweeps/{sweep}/resume", None),
        ("POST", f"/sweeps/{sweep}/cancel", None),
        ("DELETE", f"/sweeps/{sweep}", None),
    ]


def explore_imports(explorer: Explorer, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Every answer of `POST /models`, one import of a real model among them."""

    def send(**request: Any) -> None:
        parts = [("files", (file.name, file.read_bytes())) for file in model_files([folder])]
        explorer.send("POST", "/models", **{"files": parts, "data": {"text": TEXT}} | request)

    send()
    send(headers={"Host": "evil.example"})
    send(headers={"Content-Encoding": "gzip"})
    send(data={"nope": "1"})
    send(files=None, data=None, content=b"{", headers={"content-type": "multipart/form-data; boundary=x"})
    send(data={"text": "ab" * 1000})
    for error in (Unavailable("import_failed", "killed"), StorageFull("full")):

        async def fail(*_: object, error: ServiceError = error) -> None:
            raise error

        with patch.context() as patched:
            patched.setattr("service.storage.model_import.run", fail)
            send()


def explore_keys(explorer: Explorer, requests: list[tuple[str, str, Any]]) -> None:
    """What the routes answer where there are keys: each without one, and what only one who has a key is answered."""
    api, key = explorer.api, create_key(explorer.api.db, "ana", "member").key
    for method, path, body in (*requests, ("POST", "/models", None)):
        explorer.send(method, path, json=body)
    wrong, own = ({"Authorization": f"Bearer {sent}"} for sent in ("wrong", key))
    for method in ("GET", "DELETE"):
        explorer.send(method, "/session", headers=wrong)
    explorer.send("POST", "/session", json={"key": key})
    for error_code in (None, 13):
        with failing(api, error_code):
            explorer.send("POST", "/session", json={"key": key})
    with failing(api, None):
        explorer.send("GET", "/session", headers=own)


def test_every_documented_status_is_reached_and_no_other(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_url: str
) -> None:
    api = serve(max_text_bytes=1000, max_queued=4, engine_max_waiting=1)
    made = api.http.get("/openapi.json").json()
    explorer = Explorer(api, list(made["paths"]))
    send = explorer.send
    api.http.cookies.update(SIGNED_IN)
    claim = api.claim(api.submit()["id"])
    api.record_checkpoint(claim, 0, 0, tiny_files(tmp_path / "tiny"))
    queue.finish(api.db, claim, "succeeded")
    damaged = api.running().job_id
    finished, queued = claim.job_id, api.submit()["id"]
    sweep = api.http.post("/sweeps", json={"text": TEXT, "seeds": 2}).json()["id"]
    api.http.post(f"/sweeps/{sweep}/cancel")

    for _ in range(2):
        api.http.post(f"/jobs/{api.submit()['id']}/cancel")
    for twin in api.http.get("/jobs", params={"status": "cancelled", "limit": 2}).json()["data"]:
        api.http.patch(f"/jobs/{twin['id']}", json={"name": "twin"})

    requests = valid_requests(queued, finished, sweep)
    for method, path, body in requests:
        send(method, path, json=body, headers={"Host": "evil.example"})
    for error_code in (None, 13):
        with failing(api, error_code):
            for method, path, body in requests:
                if error_code is None or (method != "GET" and path not in READ_ONLY):
                    send(method, path, json=body)
    for method, path, body in requests:
        if body is not None:
            send(method, path, content=b"{", headers=JSON)
            send(method, path, content=b" " * 2_000_000, headers=JSON)
            send(method, path, json={"nope": 1})
            send(method, path, json=body, headers={"Content-Encoding": "gzip"})
        if any(given in path for given in ("/jobs/", "/models/", "/sweeps/", "?sweep=")):
            send(method, path.replace(queued, NOBODY).replace(finished, NOBODY).replace(sweep, NOBODY), json=body)
        if any(given in path for given in ("/jobs/", "/models/")):
            send(method, path.replace(queued, "twin").replace(finished, "twin"), json=body)
    for path in ("/compare", "/compare/series"):
        send("GET", path, params={"job": "twin"})
    for path in (
        f"/jobs/{queued}",
        "/jobs",
        f"/jobs/{queued}/metrics",
        f"/jobs/{finished}/checkpoints/0/reconstruction",
        "/sweeps",
        "/compare",
        "/compare/series",
    ):
        send("GET", path, params={"nope": 1})
    send("GET", f"/jobs/{finished}/events", headers={"Last-Event-ID": "x"})
    send("GET", f"/sweeps/{sweep}/events", headers={"Last-Event-ID": "x"})
    send("GET", "/events", headers={"Last-Event-ID": "x"})
    send("GET", f"/events?sweep={NOBODY}")
    send("GET", f"/sweeps/{sweep}/events", headers={"Last-Event-ID": "999"})
    send("GET", f"/jobs/{finished}/events", headers={"Last-Event-ID": "999"})
    send("DELETE", f"/jobs/{queued}")
    waiting_sweep = api.http.post("/sweeps", json={"text": TEXT, "seeds": 2}).json()["id"]
    send("DELETE", f"/sweeps/{waiting_sweep}")
    for action in ("pause", "resume", "cancel"):
        send("POST", f"/sweeps/{waiting_sweep}/{action}")
    ended = api.submit_finished_sweep(name="twins")
    api.submit_finished_sweep(name="twins")
    send("GET", "/sweeps/twins")
    for action in ("pause", "resume", "cancel"):
        send("POST", f"/sweeps/{ended}/{action}")
    for method, path, body in requests:
        send(method, path, json=body)

    for action in ("cancel", "pause", "resume"):
        send("POST", f"/jobs/{finished}/{action}")
    file = f"/jobs/{finished}/checkpoints/0/files/config.json"
    send("GET", file, headers={"Range": "bytes=0-1"})
    send("GET", file, headers={"Range": "bytes=999999-"})
    for path in (file, f"/jobs/{finished}/text"):
        send("GET", path, headers={"If-None-Match": "*"})
        send("GET", path, headers={"If-Match": '"other"'})
    next((api.context.settings.data_dir / "jobs" / finished).rglob("config.json")).unlink()
    send("GET", file)
    next((api.context.settings.data_dir / "jobs" / damaged).rglob("manifest.json")).unlink()
    send("POST", "/v1/completions", json={"model": damaged, "prompt": "a"})
    send("POST", "/jobs", json={"text": TEXT, "config": {"init_from": {"job_id": NOBODY}}})
    from_damaged = {"tokenizer": "bytes", "init_from": {"job_id": damaged, "checkpoint": 0}}
    send("POST", "/jobs", json={"text": TEXT, "config": from_damaged})
    send("POST", "/jobs", data={"text": TEXT})
    send("POST", "/jobs", json={"text": TEXT}, params={"dry_run": True})
    send("POST", "/sweeps", json={"text": TEXT, "seeds": 2}, params={"dry_run": True})
    send("POST", "/sweeps", json={"text": TEXT, "seeds": 2, "config": {"init_from": {"job_id": NOBODY}}})
    send("POST", "/sweeps", json={"text": TEXT, "seeds": 2, "config": from_damaged})
    for _ in range(4):
        send("POST", "/jobs", json={"text": TEXT})
    send("POST", "/sweeps", json={"text": TEXT, "seeds": 2})
    requests_to_models: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"prompt": "a"}),
        ("/score", {"text": "ab"}),
        ("/inspect", {"prompt": "a"}),
    ]
    (waiting,) = api.http.get("/jobs", params={"status": "queued", "limit": 1}).json()["data"]
    full = Explorer(serve(engine_max_waiting=0), list(made["paths"]))
    full.api.fill_generation()
    full_claim = full.api.running()
    for path, request in requests_to_models:
        for asker, job_id in ((explorer, NOBODY), (explorer, waiting["id"]), (full, full_claim.job_id)):
            asker.send("POST", path, json=request | {"job_id": job_id})
    send("POST", "/v1/completions", json={"model": NOBODY, "prompt": "a"})
    full.send("POST", "/v1/completions", json={"model": full_claim.job_id, "prompt": "a"})
    stored = Explorer(serve(store=bucket_url, downloads="redirect"), list(made["paths"]))
    stored.send("GET", f"/jobs/{stored.api.finished()}/checkpoints/100/files/config.json")
    guarded = Explorer(serve(), list(made["paths"]))
    explore_keys(guarded, requests)
    explore_imports(explorer, save_gpt2(tmp_path / "gpt2", gpt2()), monkeypatch)

    documented = {
        (method, path, int(status))
        for path, operations in made["paths"].items()
        for method, operation in operations.items()
        for status in operation["responses"]
    }
    assert explorer.reached | full.reached | stored.reached | guarded.reached == documented


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document."""
    return document(create_app(Settings(_env_file=None, data_dir=tmp_path_factory.mktemp("document"))))


def test_every_error_is_a_problem_or_openais(made: dict[str, Any]) -> None:
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    kind = "application/json" if path.startswith("/v1/") else "application/problem+json"
                    schema = "OpenAIError" if path.startswith("/v1/") else "Problem"
                    wanted = {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
                    assert answer["content"] == wanted, (method, path, status)


def test_every_reference_leads_somewhere(made: dict[str, Any]) -> None:
    refs = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(made)))
    assert refs <= set(made["components"]["schemas"])
    assert "HTTPValidationError" not in made["components"]["schemas"]


def test_a_submission_is_documented_as_json_and_as_a_form(made: dict[str, Any]) -> None:
    body = made["paths"]["/jobs"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    config = made["components"]["schemas"]["JobConfig"]
    assert config["properties"]["lr"]["description"].startswith("Peak learning rate")
    assert "required" not in config


def test_the_cards_of_the_experts_are_typed(made: dict[str, Any]) -> None:
    schemas = made["components"]["schemas"]
    wanted = {"type": "array", "items": {"$ref": "#/components/schemas/CardToken"}}
    cards, _ = schemas["MixtureLayer"]["properties"]["cards"]["anyOf"]
    assert cards == {"type": "array", "items": wanted}
    assert set(schemas["CardToken"]["required"]) == {"token", "id", "times"}
    moe, _ = schemas["CheckpointMetrics"]["properties"]["moe"]["anyOf"]
    assert moe == {"$ref": "#/components/schemas/MixtureMetrics"}
    assert schemas["MixtureMetrics"]["properties"]["layers"]["items"] == {"$ref": "#/components/schemas/MixtureLayer"}
    routed = schemas["InspectResponse"]["properties"]["routed_tokens"]["items"]
    assert routed == {"$ref": "#/components/schemas/RoutedToken"}


def test_no_parameter_can_be_null(made: dict[str, Any]) -> None:
    parameters = [
        parameter
        for operations in made["paths"].values()
        for operation in operations.values()
        for parameter in operation.get("parameters", [])
    ]
    assert len(parameters) > 20
    assert not [parameter for parameter in parameters if "null" in json.dumps(parameter["schema"])]


def operations_of(made: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            yield method, path, operation


def test_the_document_is_made_once_though_two_ask_for_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(data_dir=tmp_path))
    make, both, n_made = openapi._made, Barrier(2), []

    def counted(of: FastAPI) -> dict[str, Any]:
        n_made.append(of)
        with suppress(BrokenBarrierError):
            both.wait(0.5)  # for the other, if it comes
        return make(of)

    monkeypatch.setattr(openapi, "_made", counted)
    first, second = at_once([lambda: document(app)] * 2)
    assert first is second
    assert n_made == [app]


def test_the_document_is_valid(made: dict[str, Any]) -> None:
    validate(made)


# Generated clients name their functions after these.
OPERATIONS = {
    "cancel_job", "create_completion", "delete_job", "generate", "get_checkpoint", "get_checkpoint_file", "get_health",
    "get_job", "get_events", "get_job_events", "get_job_metrics", "get_job_metrics_csv", "get_job_text", "get_model",
    "get_prometheus_metrics", "get_readiness", "get_reconstruction", "inspect", "list_checkpoints", "list_jobs",
    "list_models", "list_workers", "patch_job", "pause_job", "resume_job", "score", "submit_job", "cancel_sweep",
    "compare_jobs", "compare_series", "delete_sweep", "get_sweep", "get_sweep_events", "list_sweeps", "pause_sweep",
    "list_presets", "resume_sweep", "submit_sweep", "get_session", "create_session", "delete_session",
}  # fmt: skip


def test_operations_have_stable_names(made: dict[str, Any]) -> None:
    found = [operation["operationId"] for _, _, operation in operations_of(made)]
    assert len(found) == len(set(found))
    assert set(found) >= OPERATIONS, "a name that is gone breaks generated clients"


def test_operations_are_summarised_in_words(made: dict[str, Any]) -> None:
    summaries = [operation["summary"] for _, _, operation in operations_of(made)]
    assert len(summaries) == len(set(summaries))
    for summary in summaries:
        first, *rest = summary.split()
        assert first[0].isupper(), summary
        assert rest, summary
        assert any(word[0].islower() for word in rest), f"{summary}: a name in capitals"
        assert not summary.endswith("."), summary
        assert len(summary) <= 50, summary


def descriptions(made: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Every description of the document, and where it stands: operations, answers, parameters, bodies and schemas."""
    for method, path, operation in operations_of(made):
        yield f"{method} {path}", operation.get("description")
        for status, answer in operation["responses"].items():
            yield f"{method} {path} {status}", answer["description"]
            for name, header in answer.get("headers", {}).items():
                yield f"{method} {path} {status} {name}", header.get("description")
        for parameter in operation.get("parameters", []):
            yield f"{method} {path} {parameter['name']}", parameter.get("description")
        for media, body in operation.get("requestBody", {}).get("content", {}).items():
            for field, described in body["schema"].get("properties", {}).items():
                if "$ref" not in described:
                    yield f"{method} {path} {media} {field}", described.get("description")
    for name, schema in made["components"]["schemas"].items():
        yield name, schema.get("description")
        for field, described in schema.get("properties", {}).items():
            yield f"{name}.{field}", described.get("description")


# A schema is read with its name, which its description continues: `Job`, "A job."
def test_every_description_stands_alone(made: dict[str, Any]) -> None:
    found = list(descriptions(made))
    assert len(found) > 300
    assert [(where, text) for where, text in found if not stands_alone(text)] == []


def test_the_check_sees_a_bad_description_wherever_it_stands(made: dict[str, Any]) -> None:
    bad = json.loads(json.dumps(made).replace('"Learning rate of each step."', '"Of each step."'))
    bad["paths"]["/jobs"]["get"]["parameters"][0]["description"] = "Both."
    bad["paths"]["/jobs"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["name"] = {}
    bad["paths"]["/workers"]["get"]["responses"]["200"]["description"] = "They work."
    assert len([where for where, text in descriptions(bad) if not stands_alone(text)]) == 4


def test_a_stream_is_described_in_words_and_has_no_type(made: dict[str, Any]) -> None:
    streams = [
        answer["content"]["text/event-stream"]
        for _, _, operation in operations_of(made)
        for answer in operation["responses"].values()
        if "text/event-stream" in answer.get("content", {})
    ]
    assert len(streams) == 5
    assert all(
        set(stream) - {"example"} == {"schema"} and set(stream["schema"]) == {"description"} for stream in streams
    )
