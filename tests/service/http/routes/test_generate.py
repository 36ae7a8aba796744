"""Generation through a real server and its real engine process."""

import asyncio
import json
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from nanomoe import checkpoint
from service.generation import admission
from service.generation.messages import Cancel, EngineStart, Generate, ToEngine
from service.jobs import reads
from tests.api import Api, Serve
from tests.service.tiny_checkpoint import tiny_files

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def api(generating_api: Api) -> Api:
    return generating_api


def damage(api: Api, job_id: str, percent: int) -> None:
    """Turn one bit of a checkpoint's weights."""
    folder = api.context.settings.data_dir / reads.get_checkpoint(api.db, job_id, percent).folder
    weights = bytearray((folder / checkpoint.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / checkpoint.WEIGHTS).write_bytes(weights)


def generate(api: Api, **request: Any) -> httpx.Response:
    return api.http.post("/generate", json={"prompt": "Era uma vez"} | request)


def events(answer: httpx.Response) -> list[tuple[str | None, Any]]:
    """(event, data) of a whole stream; `[DONE]` stays as it is."""
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found


def test_a_prompt_is_continued(api: Api, job_id: str) -> None:
    answer = generate(api, job_id=job_id, max_new_tokens=5, temperature=0)
    body = answer.json()
    assert answer.status_code == 200
    assert (body["job_id"], body["checkpoint"], body["prompt"]) == (job_id, 100, "Era uma vez")
    (choice,) = body["choices"]
    assert len(choice["tokens"]) == 5
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    assert body["timing"]["first_token_seconds"] >= body["timing"]["queue_seconds"] >= 0
    assert body["window_slid"] is False
    assert generate(api, job_id=job_id, checkpoint=25, max_new_tokens=5, temperature=0).json()["checkpoint"] == 25


def test_a_seed_gives_the_same_text_again_and_is_in_the_response(api: Api, job_id: str) -> None:
    first = generate(api, job_id=job_id, n=3, logprobs=True).json()
    again = generate(api, job_id=job_id, n=3, logprobs=True, seed=first["seed"]).json()
    if again["numerics"] != first["numerics"]:  # the loops became ready between the two, and round otherwise
        first, again = again, generate(api, job_id=job_id, n=3, logprobs=True, seed=first["seed"]).json()
    assert again["numerics"] == first["numerics"]
    assert again["choices"] == first["choices"]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in first["choices"]}) > 1
    for choice in first["choices"]:
        assert [one["token"] for one in choice["logprobs"]] == choice["tokens"]
        assert all(one["logprob"] <= 0 for one in choice["logprobs"])
        assert {key for one in choice["logprobs"] for key in one} == {"token", "text", "logprob", "alternatives"}
        assert all(one["alternatives"] == [] for one in choice["logprobs"])


def test_the_likeliest_tokens_stand_beside_each_chosen_one(api: Api, job_id: str) -> None:
    request = {"job_id": job_id, "temperature": 0, "max_new_tokens": 3, "logprobs": True}
    (choice,) = generate(api, **request, alternatives=4).json()["choices"]
    for chosen in choice["logprobs"]:
        likeliest = chosen["alternatives"]
        assert len(likeliest) == 4
        assert likeliest[0] == {name: chosen[name] for name in ("token", "text", "logprob")}
        assert sorted(likeliest, key=lambda one: -one["logprob"]) == likeliest
    refused = generate(api, job_id=job_id, alternatives=4)
    assert refused.status_code == 422
    assert "logprobs" in refused.text


def test_a_stream_adds_up_to_the_plain_answer(api: Api, job_id: str) -> None:
    request = {"job_id": job_id, "n": 2, "seed": 5, "max_new_tokens": 40}
    plain = generate(api, **request).json()
    streamed = generate(api, **request, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, (_, end), (_, done) = events(streamed)
    assert done == "[DONE]"
    if end["numerics"] != plain["numerics"]:  # the loops became ready between the two, and round otherwise
        plain = generate(api, **request).json()
    # Tokens that arrive while the reader is busy share a chunk; how many do is a matter of speed.
    assert len(chunks) > 2
    for choice in plain["choices"]:
        mine = [data for kind, data in chunks if data["index"] == choice["index"]]
        assert "".join(data["text"] for data in mine) == choice["text"]
        assert [token for data in mine for token in data["tokens"]] == choice["tokens"]
        assert [data["finish_reason"] for data in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
    for field in ("job_id", "checkpoint", "usage", "seed", "window_slid", "numerics"):
        assert end[field] == plain[field]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_end_where_a_stop_string_cut_the_text(api: Api, job_id: str, stream: bool) -> None:
    request = {"job_id": job_id, "seed": 3, "max_new_tokens": 40, "logprobs": True}
    whole = generate(api, **request).json()["choices"][0]
    stop = whole["text"][10:14]
    text = whole["text"][: whole["text"].index(stop)]
    n_begun = len(text.encode()) if "\ufffd" not in text else None
    answer = generate(api, **request, stop=[stop], stream=stream)
    told = [data for kind, data in events(answer) if kind == "chunk"] if stream else answer.json()["choices"]
    assert "".join(one["text"] for one in told) == text
    assert told[-1]["finish_reason"] == "stop"
    tokens = [token for one in told for token in one["tokens"]]
    assert tokens == whole["tokens"][: len(tokens)]
    assert bytes(tokens).decode(errors="replace").startswith(text)
    assert not bytes(tokens[:-1]).decode(errors="ignore").startswith(whole["text"][: len(text) + 1])
    assert n_begun is None or len(tokens) == n_begun
    assert [one["token"] for piece in told for one in piece["logprobs"]] == tokens


def test_a_text_that_is_cut_at_once_is_a_choice_without_tokens(api: Api, job_id: str) -> None:
    request = {"job_id": job_id, "temperature": 0, "max_new_tokens": 8, "logprobs": True}
    whole = generate(api, **request).json()["choices"][0]["text"]
    for stream in (False, True):
        answer = generate(api, **request, stop=[whole[:2]], stream=stream)
        (told,) = [data for kind, data in events(answer) if kind == "chunk"] if stream else answer.json()["choices"]
        assert (told["text"], told["tokens"], told["logprobs"], told["finish_reason"]) == ("", [], [], "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("changes", "status", "expected"),
    [
        ({"prompt": ""}, 422, "empty_prompt"),
        ({"prompt": None}, 422, "invalid_request"),
        ({"job_id": "../etc"}, 404, "job_not_found"),
        ({"job_id": "\0"}, 422, "invalid_request"),
        ({"job_id": ""}, 422, "invalid_request"),
        ({"job_id": NOBODY}, 404, "job_not_found"),
        ({"checkpoint": 50}, 404, "checkpoint_not_found"),
        ({"checkpoint": 51}, 422, "invalid_request"),
        ({"checkpoint": "newest"}, 422, "invalid_request"),
        ({"max_new_tokens": 0}, 422, "invalid_request"),
        ({"max_new_tokens": 5000}, 422, "max_new_tokens_too_large"),
        ({"n": 65}, 422, "n_too_large"),
        ({"temperature": -1}, 422, "invalid_request"),
        ({"temperature": True}, 422, "invalid_request"),
        ({"top_p": 0}, 422, "invalid_request"),
        ({"seed": 2**63}, 422, "invalid_request"),
        ({"stop": [""]}, 422, "invalid_request"),
        ({"stop": "x"}, 422, "invalid_request"),
        ({"nope": 1}, 422, "invalid_request"),
    ],
)
def test_a_bad_request_gets_its_code(
    api: Api, job_id: str, stream: bool, changes: dict[str, Any], status: int, expected: str
) -> None:
    answer = generate(api, **({"job_id": job_id, "stream": stream} | changes))
    assert (answer.status_code, answer.json()["code"]) == (status, expected)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("body", [b"{", b"", b"[" * 100_000, b'{"temperature": NaN}', b'{"prompt": "\\ud800"}', b"5"])
def test_a_body_that_is_no_request_is_refused(api: Api, body: bytes) -> None:
    answer = api.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) in {(400, "invalid_body"), (422, "invalid_request")}


def test_a_job_without_a_checkpoint_is_a_conflict(api: Api) -> None:
    for which in ("latest", 100):
        answer = generate(api, job_id=api.submit()["id"], checkpoint=which)
        assert (answer.status_code, answer.json()["code"]) == (409, "no_checkpoint_yet")


def test_a_damaged_checkpoint_is_a_conflict(api: Api, tmp_path: Path) -> None:
    claim = api.claim(api.submit()["id"])
    for percent in (0, 25):
        api.record_checkpoint(claim, percent, percent, tiny_files(tmp_path / str(percent), seed=7 + percent))
        damage(api, claim.job_id, percent)
    for which, percent in (("latest", 25), (25, 25), (0, 0)):
        answer = generate(api, job_id=claim.job_id, checkpoint=which)
        assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_damaged")
        assert f"f1-{percent}" in answer.json()["detail"]


@pytest.mark.parametrize("stream", [False, True])
def test_latest_is_the_newest_undamaged_checkpoint(api: Api, tmp_path: Path, stream: bool) -> None:
    claim = api.claim(api.submit()["id"])
    for percent in (0, 25, 50):
        # Other models than in the other tests: what is loaded already is not read again.
        files = tiny_files(tmp_path / str(percent), seed=100 + 10 * stream + percent)
        api.record_checkpoint(claim, percent, percent, files)
    for percent in (25, 50):
        damage(api, claim.job_id, percent)
    with capture_logs() as logged:
        answer = generate(api, job_id=claim.job_id, stream=stream)
    body = dict(events(answer))["end"] if stream else answer.json()
    assert (answer.status_code, body["checkpoint"]) == (200, 0)
    assert [entry["percent"] for entry in logged if entry["event"] == "checkpoint_damaged"] == [50, 25]
    named = generate(api, job_id=claim.job_id, checkpoint=50, stream=stream)
    assert (named.status_code, named.json()["code"]) == (409, "checkpoint_damaged")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_slot(
    api: Api, job_id: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"job_id": job_id, "prompt": "Era", "max_new_tokens": 4096, "stream": stream}
    generation = api.context.generation
    sent: SimpleQueue[ToEngine | EngineStart] = SimpleQueue()
    send = admission.send

    async def recorded(process: asyncio.subprocess.Process, message: ToEngine | EngineStart) -> None:
        await send(process, message)
        sent.put(message)

    monkeypatch.setattr(admission, "send", recorded)

    async def ask_and_leave() -> None:
        async with httpx.AsyncClient(base_url=api.url) as http:
            asking = asyncio.create_task(http.post("/generate", json=request))
            begun = await asyncio.to_thread(sent.get, timeout=20)
            assert isinstance(begun, Generate)
            asking.cancel()
            assert await asyncio.to_thread(sent.get, timeout=20) == Cancel(id=begun.id)

    asyncio.run(ask_and_leave())
    assert generation.n_running == generation.n_waiting == 0


def test_an_engine_that_cannot_start_is_503(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = serve()
    claim = api.running()
    monkeypatch.setattr("sys.executable", "/bin/false")
    answer = generate(api, job_id=claim.job_id)
    assert (answer.status_code, answer.json()["code"]) == (503, "generation_unavailable")
    assert int(answer.headers["retry-after"]) > 0
