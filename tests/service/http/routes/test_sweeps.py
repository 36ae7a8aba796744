"""Sweeps over HTTP: what is submitted and refused, read, asked for, and followed as a stream."""

import json
from typing import Any

import pytest

from service.jobs import queue, reads
from service.jobs.workers import WorkerIdentity, worker_started, worker_stopped
from tests.api import TEXT, Api, Serve
from tests.queued import everything

BYTES = {"tokenizer": "bytes"}


def sweep(api: Api, sweep_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.http.get(f"/sweeps/{sweep_id}").json()
    return found


def configs(api: Api, sweep: dict[str, Any]) -> list[dict[str, Any]]:
    return [reads.get_job(api.db, job_id).config for job_id in sweep["job_ids"]]


def test_a_grid_gives_a_job_for_each_combination_and_seed(api: Api) -> None:
    answer = api.http.post(
        "/sweeps",
        json={
            "text": TEXT,
            "name": "width",
            "tags": {"course": "nlp"},
            "config": BYTES | {"epochs": 7},
            "grid": {"n_embd": [64, 128.0], "grad_clip": [None, 1]},
            "seeds": 2,
        },
    )
    assert answer.status_code == 201
    made = answer.json()
    assert answer.headers["Location"] == f"/sweeps/{made['id']}"
    assert made == sweep(api, made["id"])
    assert made["parameters"] == [
        {"name": "n_embd", "values": [64, 128]},
        {"name": "grad_clip", "values": [None, 1.0]},
        {"name": "seed", "values": [42, 43]},
    ]
    assert (made["status"], made["counts"]["queued"], made["progress"]["total_steps"]) == ("queued", 8, 8 * 7)
    found = configs(api, made)
    assert [(one["n_embd"], one["grad_clip"], one["seed"]) for one in found] == [
        (width, clip, seed) for width in (64, 128) for clip in (None, 1.0) for seed in (42, 43)
    ]
    assert {(one["epochs"], one["tokenizer"]) for one in found} == {(7, "bytes")}
    job = api.http.get(f"/jobs/{made['job_ids'][-1]}").json()
    assert job["name"] == "width: n_embd=128, grad_clip=1, seed=43"
    assert job["tags"] == {"course": "nlp", "sweep": made["id"]}
    assert job["sweep_id"] == made["id"]
    assert job["model"]["n_params"] > 0
    listed = api.http.get("/jobs", params={"tag": f"sweep={made['id']}"}).json()["data"]
    assert [one["id"] for one in listed] == made["job_ids"][::-1]


def test_points_may_differ_in_anything_and_have_texts_of_their_own(api: Api) -> None:
    points = [{"text": "olá mundo"}, {"dropout": 0}, {"text": "\ufeffolá mundo", "lr": 1e-3}]
    made = api.submit_sweep(points=points)
    assert [(one["dropout"], one["lr"]) for one in configs(api, made)] == [(0.2, 1e-4), (0, 1e-4), (0.2, 1e-3)]
    texts = [api.http.get(f"/jobs/{job_id}/text").text for job_id in made["job_ids"]]
    assert texts == ["olá mundo", TEXT, "olá mundo"]
    (in_texts,) = (one["values"] for one in made["parameters"] if one["name"] == "text")
    assert in_texts == [api.http.get(f"/jobs/{job_id}").json()["text"]["sha256"] for job_id in made["job_ids"][:2]]


def test_knobs_may_be_valid_together_only(api: Api) -> None:
    api.submit_sweep(config=BYTES | {"k": 16}, points=[{"n_experts": 16}, {"n_experts": 32}])


def test_a_dry_run_writes_nothing(api: Api) -> None:
    before = everything(api.db)
    request = {
        "text": TEXT,
        "config": BYTES | {"use_moe": True, "k": 1, "norm_topk_prob": True},
        "grid": {"n_layer": [2, 4]},
        "seeds": 3,
    }
    answer = api.http.post("/sweeps", params={"dry_run": True}, json=request)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["n_jobs"], found["total_steps"], found["predicted_seconds"]) == (6, 3000, None)
    assert [(shape["n_jobs"], shape["total_steps"]) for shape in found["shapes"]] == [(3, 500), (3, 500)]
    assert found["shapes"][0]["n_params"] < found["shapes"][1]["n_params"]
    assert found["training_bytes"] == max(shape["training_bytes"] for shape in found["shapes"])
    assert {warning["n_jobs"] for warning in found["warnings"]} == {6}
    assert everything(api.db) == before


def test_a_dry_run_says_which_jobs_will_be_trained_together(api: Api) -> None:
    request = {
        "text": TEXT,
        "config": BYTES | {"n_embd": 16, "epochs": 4},
        "grid": {"n_head": [1, 2], "epochs": [4, 5, 9]},
        "seeds": 2,
    }

    def dry_run() -> dict[str, Any]:
        found: dict[str, Any] = api.http.post("/sweeps", params={"dry_run": True}, json=request).json()
        return found

    found = dry_run()
    assert (found["cohorts"], found["predicted_seconds"], found["predicted_alone_seconds"]) == (None, None, None)
    assert {shape["together"] for shape in found["shapes"]} == {None}
    worker = WorkerIdentity(cohort=4, devices=[{"device": "cpu", "name": "cpu", "memory_bytes": 2**30}])
    worker_started(api.db, worker)
    found = dry_run()
    assert found["cohorts"] == [{"n_jobs": 4, "n_cohorts": 2}, {"n_jobs": 2, "n_cohorts": 2}]
    assert [(one["n_jobs"], one["total_steps"], one["together"]) for one in found["shapes"]] == [
        (2, 4, 4), (2, 5, 4), (2, 9, 2)
    ] * 2  # fmt: skip
    assert len({one["n_params"] for one in found["shapes"]}) == 1  # the shape of their tensors tells them apart
    api.submit_sweep(**request)
    claimed = queue.claim_cohorts(api.db, worker, 60, 2, 4)  # whichever comes first of what other tests have left
    (listed,) = (one for one in api.http.get("/workers").json()["data"] if one["id"] == worker.id)
    held = [one for cohort in claimed for one in cohort]
    assert (listed["slots"], listed["busy_slots"], len(listed["current_jobs"])) == (1, 2, len(held))
    assert len(held) > 2
    assert listed["devices"][0]["cohort"] == 4
    for one in held:
        queue.release(api.db, one)
    worker_stopped(api.db, worker.id)


def test_a_repeated_request_with_a_key_gets_the_same_sweep(api: Api) -> None:
    request = {"text": TEXT, "config": BYTES, "seeds": 2}
    first, again = (api.http.post("/sweeps", json=request, headers={"Idempotency-Key": "sweep-once"}) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = api.http.post("/sweeps", json=request | {"seeds": 3}, headers={"Idempotency-Key": "sweep-once"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


REFUSED: list[tuple[dict[str, Any], str, list[list[str | int]]]] = [
    ({}, "empty_sweep", [["body"]]),
    ({"grid": {}}, "empty_sweep", [["body", "grid"]]),
    ({"grid": {"lr": [1e-3], "n_embd": []}}, "empty_sweep", [["body", "grid", "n_embd"]]),
    ({"points": []}, "empty_sweep", [["body", "points"]]),
    ({"grid": {"lr": [1e-3]}, "points": [{}]}, "invalid_request", [["body"]]),
    ({"grid": {"learning_rate": [1]}}, "unknown_knob", [["body", "grid", "learning_rate"]]),
    ({"grid": {"text": ["a b"]}}, "unknown_knob", [["body", "grid", "text"]]),
    ({"points": [{}, {"x": 1}]}, "unknown_knob", [["body", "points", 1, "x"]]),
    ({"grid": {"deterministic": [True, False]}}, "not_sweepable", [["body", "grid", "deterministic"]]),
    ({"points": [{"init_from": None}]}, "not_sweepable", [["body", "points", 0, "init_from"]]),
    ({"grid": {"lr": [1e-3, "high"]}}, "mixed_types", [["body", "grid", "lr"]]),
    ({"points": [{"bias": True}, {"bias": 0}]}, "mixed_types", [["body", "points"]]),
    ({"grid": {"n_embd": [64, 64.0]}}, "repeated_points", [["body", "grid", "n_embd", 1]]),
    ({"points": [{"lr": 1e-3}, {"lr": 0.001}]}, "repeated_points", [["body", "points", 1]]),
    ({"points": [{"seed": 1}, {"seed": 2}], "seeds": 2}, "repeated_points", [["body", "points", 1]]),
    ({"points": [{}, {"dropout": 0.2}]}, "repeated_points", [["body", "points", 1]]),
    ({"grid": {"seed": [1, 2]}, "seeds": 2}, "invalid_points", [["body", "grid", "seed"]]),
    ({"config": {"lr": 11}, "seeds": 2}, "invalid_points", [["body", "config", "lr"]]),
    ({"config": {"nope": 1}, "seeds": 2}, "invalid_points", [["body", "config", "nope"]]),
    (
        {"grid": {"lr": [0, 1e-3, 11], "dropout": [0, 1]}},
        "invalid_points",
        [["body", "grid", "lr", 0], ["body", "grid", "lr", 2], ["body", "grid", "dropout", 1]],
    ),
    ({"points": [{"lr": 0}, {}, {"lr": 11}]}, "invalid_points",
     [["body", "points", 0, "lr"], ["body", "points", 2, "lr"]]),
    ({"grid": {"n_embd": [64, 66], "n_head": [4, 8]}}, "invalid_points", [["body", "grid"], ["body", "grid"]]),
    ({"points": [{"k": 9}, {}]}, "invalid_points", [["body", "points", 0]]),
    ({"points": [{"text": ""}, {"text": 1}]}, "invalid_points",
     [["body", "points", 0, "text"], ["body", "points", 1, "text"]]),
    ({"points": [{"text": "a"}, {}, {"n_layer": 256, "n_embd": 65_536}]}, "invalid_points",
     [["body", "points", 0], ["body", "points", 2]]),
    ({"seeds": 2, "config": {"seed": 2**63 - 1}}, "invalid_points", [["body", "seeds"]]),
    ({"seeds": 2, "tags": {"sweep": "x"}}, "invalid_request", [["body"]]),
    ({"seeds": 2, "text": None}, "invalid_points", [["body", "text"]]),
    ({"seeds": 1001}, "invalid_request", [["body", "seeds"]]),
]  # fmt: skip


def test_what_is_no_sweep_is_refused_by_name_and_leaves_nothing(api: Api) -> None:
    before = everything(api.db)
    for changes, code, places in REFUSED:
        request = {"text": TEXT, **changes, "config": BYTES | changes.get("config", {})}
        answer = api.http.post("/sweeps", json=request)
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (422, code), (changes, problem)
        assert [error["loc"] for error in problem["errors"]] == places, (changes, problem)
    assert everything(api.db) == before


def test_in_a_grid_the_values_name_a_point(api: Api) -> None:
    request = {"text": TEXT, "config": BYTES, "grid": {"n_embd": [64, 66], "n_head": [4]}}
    (error,) = api.http.post("/sweeps", json=request).json()["errors"]
    assert error["msg"] == "n_embd=66, n_head=4: n_embd (66) must be a multiple of n_head (4)"


def test_a_product_that_is_too_large_is_refused_with_its_number(api: Api) -> None:
    values = [number / 1000 for number in range(1, 4001)]
    answer = api.http.post("/sweeps", json={"text": TEXT, "grid": {"lr": values, "dropout": values[:900]}, "seeds": 3})
    assert answer.json()["code"] == "sweep_too_large"
    assert answer.json()["detail"].startswith("the sweep would have 4,000 x 900 x 3 seeds = 10,800,000 jobs; at most")


def test_the_server_says_how_many_may_wait(serve: Serve) -> None:
    api = serve(max_queued=3)
    refused = api.http.post("/sweeps", json={"text": TEXT, "seeds": 4})
    assert (refused.status_code, refused.json()["code"]) == (422, "sweep_too_large")
    api.submit()
    full = api.http.post("/sweeps", json={"text": TEXT, "seeds": 3})
    assert (full.status_code, full.json()["code"], full.headers["Retry-After"]) == (429, "queue_full", "60")
    api.submit_sweep(seeds=2)


def test_many_faults_are_counted_and_the_first_listed(api: Api) -> None:
    points = [{"lr": 11 + number} for number in range(30)]
    problem = api.http.post("/sweeps", json={"text": TEXT, "points": points}).json()
    assert problem["detail"].startswith("30 faults in 30 points, of which 20 are listed; the first: body.points.0.lr")
    assert len(problem["errors"]) == 20


def test_a_sweep_starts_from_a_checkpoint(api: Api) -> None:
    parent = api.finished()
    made = api.submit_sweep(config=BYTES | {"init_from": {"job_id": parent}}, seeds=2)
    assert {reads.get_job(api.db, job_id).parent_id for job_id in made["job_ids"]} == {parent}
    queue.request_cancel_sweep(api.db, made["id"])
    assert api.http.delete(f"/jobs/{parent}").json()["code"] == "has_dependents"


def test_a_text_is_tokenised_once_for_each_tokenizer(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.jobs import submission

    seen = []
    tokenise = submission._tokenise

    def counted(text: str, name: str, *rest: Any) -> Any:
        seen.append((text, name))
        return tokenise(text, name, *rest)

    monkeypatch.setattr(submission, "_tokenise", counted)
    points = [{"tokenizer": name, "lr": lr} for name in ("bytes", "train:300") for lr in (1e-4, 1e-3)]
    api.submit_sweep(points=[*points, {"text": "olá mundo", "tokenizer": "bytes"}], seeds=3)
    assert seen == [(TEXT, "bytes"), (TEXT, "train:300"), ("olá mundo", "bytes")]


def test_sweeps_are_listed_page_by_page(serve: Serve) -> None:
    api = serve()
    made = [api.submit_sweep(name=name)["id"] for name in "abc"]
    page = api.http.get("/sweeps", params={"limit": 2}).json()
    assert [(one["id"], one["job_ids"], one["progress"]) for one in page["data"]] == [
        (made[2], None, None),
        (made[1], None, None),
    ]
    last = api.http.get("/sweeps", params={"cursor": page["next_cursor"]}).json()
    assert ([one["name"] for one in last["data"]], last["next_cursor"]) == (["a"], None)


def test_a_whole_sweep_is_paused_resumed_cancelled_and_deleted(api: Api) -> None:
    made = api.submit_sweep(seeds=3)
    for action, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = api.http.post(f"/sweeps/{made['id']}/{action}")
        assert (answer.status_code, answer.json()["status"]) == (202, status)
        assert answer.json()["counts"][status] == 3
    assert api.http.delete(f"/sweeps/{made['id']}").status_code == 204
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events")):
        answer = api.http.request(method, f"/sweeps/{made['id']}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "sweep_not_found")
    assert api.http.get(f"/jobs/{made['job_ids'][0]}").status_code == 404


def test_deleting_a_sweep_removes_the_files_of_its_jobs(api: Api) -> None:
    sweep_id = api.submit_finished_sweep()
    folders = [api.context.settings.data_dir / "jobs" / job_id for job_id in sweep(api, sweep_id)["job_ids"]]
    assert all(folder.is_dir() for folder in folders)
    api.http.delete(f"/sweeps/{sweep_id}")
    assert not any(folder.exists() for folder in folders)


def stream_of(api: Api, sweep_id: str, last: int | None = None) -> list[tuple[str, int, dict[str, Any]]]:
    """The events of a sweep that has ended: (event, id, data)."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    answer = api.http.get(f"/sweeps/{sweep_id}/events", headers=headers)
    assert answer.status_code == 200
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    return [(block["event"], int(block["id"]), json.loads(block["data"])) for block in blocks]


def test_the_stream_of_a_sweep_holds_status_and_checkpoints_of_all_jobs(api: Api) -> None:
    sweep_id = api.submit_finished_sweep()
    first, second = sweep(api, sweep_id)["job_ids"]
    found = stream_of(api, sweep_id)
    assert [number for _, number, _ in found] == sorted(number for _, number, _ in found)
    for job_id in (first, second):
        of_job = [data for _, _, data in found if data["job_id"] == job_id]
        assert [data["status"] for data in of_job if "status" in data][-2:] == ["running", "succeeded"]
        assert [(data["percent"], data["loss"]) for data in of_job if "percent" in data] == [(0, 2.0), (100, 2.0)]
    for place, (_, number, _) in enumerate(found[:-1], start=1):
        assert stream_of(api, sweep_id, number) == found[place:]
    ended = api.http.get(f"/sweeps/{sweep_id}/events", headers={"Last-Event-ID": str(found[-1][1])})
    assert ended.status_code == 204


def test_the_stream_of_a_sweep_follows_it_to_its_end(api: Api) -> None:
    made = api.submit_sweep()
    with api.http.stream("GET", f"/sweeps/{made['id']}/events") as answer:
        lines = answer.iter_lines()
        before = [line for line in (next(lines) for _ in range(8)) if line.startswith("data")]
        assert [json.loads(line[6:])["status"] for line in before] == ["queued", "queued"]
        api.http.post(f"/sweeps/{made['id']}/cancel")
        after = [line for line in lines if line.startswith("data")]
        assert [json.loads(line[6:])["status"] for line in after] == ["cancelled", "cancelled"]
