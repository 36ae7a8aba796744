"""One prompt continued from several checkpoints by one request, through a real server and its real engine process."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanomoe import checkpoint
from service.client import AsyncClient, Client, Conflict, NotFound
from service.http import targets
from service.http.schemas import GenerateChunk, GenerateEnd
from service.jobs import queue, reads
from tests.api import Api
from tests.service.tiny_checkpoint import write_tiny_checkpoint

NOBODY = "0" * 32
PROMPT = "Era uma vez"


@pytest.fixture(scope="module")
def api(generating_api: Api) -> Api:
    return generating_api


def finish_with_weights(api: Api, folder: Path, seed: int, **changes: Any) -> str:
    """A job that has succeeded, with other random weights at 25 and at 100 percent."""
    claim = api.claim(api.submit(**changes)["id"])
    for percent in (25, 100):
        write_tiny_checkpoint(folder / str(percent), seed=seed + percent)
        files = {p.name: p.read_bytes() for p in (folder / str(percent)).iterdir() if p.name != checkpoint.MANIFEST}
        api.record_checkpoint(claim, percent, percent * 5, files)
    queue.finish(api.db, claim, "succeeded")
    return claim.job_id


@pytest.fixture(scope="module")
def jobs(api: Api, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two such jobs; the second one's name is `outro`."""
    made = tmp_path_factory.mktemp("tiny")
    return [finish_with_weights(api, made / name, seed, name=name) for name, seed in (("um", 1_000), ("outro", 2_000))]


def ask(api: Api, targets: Any, **request: Any) -> httpx.Response:
    return api.http.post("/generate", json={"prompt": PROMPT, "targets": targets, "max_new_tokens": 8} | request)


def named(jobs: list[str]) -> list[dict[str, Any]]:
    return [{"job_id": jobs[0], "checkpoint": 25}, {"job_id": "outro", "checkpoint": 100}, {"job_id": jobs[0]}]


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("timing", "target")}


def test_each_target_answers_what_it_would_alone_with_that_seed(api: Api, jobs: list[str]) -> None:
    body = ask(api, named(jobs), n=2, logprobs=True).json()
    assert (body["prompt"], len(body["answers"])) == (PROMPT, 3)
    used = [(jobs[0], 25), (jobs[1], 100), (jobs[0], 100)]
    assert [(one["target"], one["job_id"], one["checkpoint"]) for one in body["answers"]] == [
        (n, *target) for n, target in enumerate(used)
    ]
    # By tokens: bytes that are no UTF-8 read alike.
    assert len({json.dumps(one["choices"][0]["tokens"]) for one in body["answers"]}) == 3
    for answer, (job_id, percent) in zip(body["answers"], used, strict=True):
        request = {"job_id": job_id, "checkpoint": percent, "prompt": PROMPT, "max_new_tokens": 8, "n": 2}
        alone = api.http.post("/generate", json=request | {"logprobs": True, "seed": body["seed"]}).json()
        if alone["numerics"] == answer["numerics"]:  # else the loops became ready between the two, and round otherwise
            assert without_times(answer) == without_times(alone)


def test_a_stream_says_whose_each_event_is(api: Api, jobs: list[str]) -> None:
    plain = ask(api, named(jobs), seed=5).json()
    streamed = ask(api, named(jobs), seed=5, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *blocks, done = streamed.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    told = [(event["event"], json.loads(event["data"])) for event in events]
    for n, answer in enumerate(plain["answers"]):
        *chunks, (kind, end) = [(kind, data) for kind, data in told if data["target"] == n]
        assert kind == "end"
        assert {kind for kind, _ in chunks} == {"chunk"}
        if end["numerics"] == answer["numerics"]:
            assert "".join(data["text"] for _, data in chunks) == answer["choices"][0]["text"]
            assert without_times(end) == {name: answer[name] for name in without_times(end)}


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_is_admitted_or_refused_and_the_others_follow_a_few_at_a_time(
    api: Api, jobs: list[str], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    running = most = 0
    follows = []
    generate = api.context.generation.stream

    async def counted(*request: Any, **how: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        follows.append(how["follows"])
        async for item in generate(*request, **how):
            yield item
        running -= 1

    monkeypatch.setattr(api.context.generation, "stream", counted)
    answer = ask(api, [{"job_id": jobs[0]}] * 32, max_new_tokens=1, stream=stream)
    assert answer.text.count("event: end") == 32 if stream else len(answer.json()["answers"]) == 32
    assert (running, most) == (0, targets.AT_ONCE)
    assert follows == [False, *[True] * 31]


@pytest.mark.parametrize("stream", [False, True])
def test_all_targets_are_found_before_any_is_continued(api: Api, jobs: list[str], stream: bool) -> None:
    waiting = api.submit()["id"]
    asked = [{"job_id": jobs[0]}, {"job_id": NOBODY}, {"job_id": jobs[1], "checkpoint": 50}, {"job_id": waiting}]
    refused = ask(api, asked, stream=stream)
    assert (refused.status_code, refused.json()["code"]) == (404, "job_not_found")
    assert [(fault["loc"], fault["msg"].split()[-1]) for fault in refused.json()["errors"]] == [
        (["body", "targets", 1], f"'{NOBODY}'"),
        (["body", "targets", 2], "yet"),
        (["body", "targets", 3], "yet"),
    ]
    assert ask(api, asked[2:], stream=stream).json()["code"] == "checkpoint_not_found"
    assert (ask(api, asked[3:]).status_code, ask(api, asked[3:]).json()["code"]) == (409, "no_checkpoint_yet")


@pytest.mark.parametrize("stream", [False, True])
def test_latest_falls_back_and_a_named_damaged_checkpoint_is_named(api: Api, tmp_path: Path, stream: bool) -> None:
    good = finish_with_weights(api, tmp_path / "good", 3_000 + stream)
    bad = finish_with_weights(api, tmp_path / "bad", 4_000 + stream)
    weights = api.context.settings.data_dir / reads.get_checkpoint(api.db, bad, 100).folder / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    refused = ask(api, [{"job_id": good}, {"job_id": bad, "checkpoint": 100}], stream=stream)
    if stream and refused.status_code == 200:  # the first has begun: the stream says it
        problem = json.loads(refused.text.split("event: error\ndata: ")[1].split("\n\n")[0])
    else:
        problem = refused.json()
    assert problem["code"] == "checkpoint_damaged"
    assert [fault["loc"] for fault in problem["errors"]] == [["body", "targets", 1]]
    found = ask(api, [{"job_id": bad}, {"job_id": good}])
    assert [one["checkpoint"] for one in found.json()["answers"]] == [25, 100]


@pytest.mark.parametrize(
    ("request_", "code", "loc"),
    [
        ({"targets": []}, "invalid_request", ["body", "targets"]),
        ({"targets": [{"job_id": "um"}] * 33}, "invalid_request", ["body", "targets"]),
        ({"targets": None}, "invalid_request", ["body"]),
        ({"targets": [{"job_id": "um"}], "job_id": "um"}, "invalid_request", ["body"]),
        ({"targets": [{"job_id": "um"}], "checkpoint": 25}, "invalid_request", ["body"]),
        ({"targets": [{"job_id": "um"}, {"checkpoint": 25}]}, "invalid_request", ["body", "targets", 1, "job_id"]),
        ({"targets": [{"job_id": "um", "prompt": "x"}]}, "invalid_request", ["body", "targets", 0, "prompt"]),
        ({"targets": ["um@25"]}, "invalid_request", ["body", "targets", 0]),
        ({"targets": [{"job_id": "um"}] * 2, "prompt": ""}, "empty_prompt", ["body", "prompt"]),
        ({"targets": [{"job_id": "um"}] * 2, "n": 65}, "n_too_large", ["body", "n"]),
        ({"targets": [{"job_id": "um"}] * 3, "n": 50, "max_new_tokens": 4_000}, "too_many_tokens", ["body", "targets"]),
    ],
)
@pytest.mark.usefixtures("jobs")
def test_bad_targets_are_refused_by_place(api: Api, request_: dict[str, Any], code: str, loc: list[Any]) -> None:
    refused = api.http.post("/generate", json={"prompt": PROMPT} | request_)
    assert (refused.status_code, refused.json()["code"]) == (422, code)
    assert refused.json()["errors"][0]["loc"] == loc


def test_both_clients_continue_side_by_side(api: Api, jobs: list[str]) -> None:
    with Client(api.url) as client:
        found = client.generate([f"{jobs[0]}@25", "outro", (jobs[0], "latest")], PROMPT, max_new_tokens=4, seed=1)
        pieces = list(client.generate(["um", "outro@25"], PROMPT, max_new_tokens=4, stream=True))
        with pytest.raises(NotFound) as raised:
            client.generate(["um", "nobody@50"], PROMPT)
        assert raised.value.errors[0].loc == ["body", "targets", 1]
        with pytest.raises(Conflict):
            client.sweep("abc", {"tokenizer": "bytes"}, seeds=2).generate(PROMPT)
    assert [one.checkpoint for one in found.answers] == [25, 100, 100]
    assert sorted(piece.target for piece in pieces if isinstance(piece, GenerateEnd)) == [0, 1]
    assert {piece.target for piece in pieces if isinstance(piece, GenerateChunk)} == {0, 1}

    async def go() -> None:
        async with AsyncClient(api.url) as client:
            again = await client.generate([f"{jobs[0]}@25", "outro"], PROMPT, max_new_tokens=4, seed=1)
            assert [one.job_id for one in again.answers] == jobs
            ends = [p async for p in client.generate(["um"], PROMPT, stream=True) if isinstance(p, GenerateEnd)]
            assert [end.job_id for end in ends] == jobs[:1]

    asyncio.run(go())
