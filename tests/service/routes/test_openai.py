"""`/v1` as OpenAI's own client library uses it, and its errors as they are on the wire."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from service import queue
from tests.api import Api, Serve
from tests.service.routes.test_generate import damage, generate, tiny_files

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def job_id(api: Api, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job with a random model at 25 and at 100 percent."""
    claim = api.claim(api.submit()["id"])
    files = tiny_files(tmp_path_factory.mktemp("tiny") / "checkpoint")
    for percent in (25, 100):
        api.record_checkpoint(claim, percent, percent * 5, files)
    queue.finish(api.db, claim, "succeeded")
    return claim.job_id


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(api: Api, **body: Any) -> httpx.Response:
    return api.http.post("/v1/completions", json={"prompt": "Era uma vez"} | body)


def test_a_completion_is_the_same_text_as_generate_gives(api: Api, client: OpenAI, job_id: str) -> None:
    request = {"n": 2, "seed": 7, "temperature": 0.9, "top_p": 0.95}
    wanted = generate(api, job_id=job_id, checkpoint=25, max_new_tokens=12, **request).json()
    answer = client.completions.create(model=f"{job_id}@25", prompt="Era uma vez", max_tokens=12, **request)
    assert answer.model == f"{job_id}@25"
    assert answer.object == "text_completion"
    assert answer.system_fingerprint
    assert [(one.index, one.text, one.finish_reason) for one in answer.choices] == [
        (one["index"], one["text"], one["finish_reason"]) for one in wanted["choices"]
    ]
    assert answer.usage is not None
    assert answer.usage.to_dict() == wanted["usage"]


def test_defaults_are_openais_and_null_means_them(api: Api, client: OpenAI, job_id: str) -> None:
    left_out = client.completions.create(model=job_id, prompt="Era", seed=1)
    null = client.completions.create(
        model=job_id, prompt="Era", seed=1, max_tokens=None, temperature=None, n=None, stop=None, logprobs=None
    )
    wanted = generate(api, job_id=job_id, prompt="Era", max_new_tokens=16, seed=1).json()
    assert left_out.choices[0].text == null.choices[0].text == wanted["choices"][0]["text"]
    assert left_out.model == f"{job_id}@100"


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_plain_answer(client: OpenAI, job_id: str, echo: bool) -> None:
    request: dict[str, Any] = {"model": job_id, "prompt": "É uma", "max_tokens": 60, "n": 2, "seed": 3, "echo": echo}
    plain = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert len(chunks) > 2
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    for choice in plain.choices:
        mine = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert choice.text.startswith("É uma") == echo
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + ["length"]


def test_usage_comes_last_where_it_is_asked_for(client: OpenAI, job_id: str) -> None:
    stream = client.completions.create(
        model=job_id, prompt="Era", max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 5, 8)
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_done(api: Api, job_id: str) -> None:
    answer = complete(api, model=job_id, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(chunk.removeprefix("data: "))["object"] == "text_completion" for chunk in chunks)


@pytest.mark.parametrize("several", [False, True])
def test_a_text_ends_before_a_stop_string(client: OpenAI, job_id: str, several: bool) -> None:
    request: dict[str, Any] = {"model": job_id, "prompt": "Era", "max_tokens": 30, "seed": 1}
    whole = client.completions.create(**request).choices[0].text
    stop = whole[9:12]
    (choice,) = client.completions.create(**request, stop=["never said", stop] if several else stop).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_logprobs_tell_tokens_rivals_and_offsets(client: OpenAI, job_id: str) -> None:
    request: dict[str, Any] = {"model": job_id, "prompt": "Era", "max_tokens": 40, "seed": 2, "logprobs": 3}
    (choice,) = client.completions.create(**request).choices
    told = choice.logprobs
    assert told is not None
    assert told.tokens
    assert told.token_logprobs
    assert told.top_logprobs
    assert told.text_offset
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 40
    for token, logprob, rivals, offset in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):
        assert rivals[token] == logprob
        assert len(rivals) in (3, 4)
        if not token.startswith("bytes:"):
            assert choice.text[offset:].lstrip("\ufffd").startswith(token)
    assert any(token.startswith("bytes:\\x") for token in told.tokens), "some tokens of this model split characters"
    streamed = [piece for chunk in client.completions.create(**request, stream=True) for piece in chunk.choices]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [one for piece in streamed for one in getattr(piece.logprobs, field)]
        assert joined == getattr(told, field)


def test_models_are_the_recorded_checkpoints(client: OpenAI, job_id: str) -> None:
    listed = [model.id for model in client.models.list()]
    assert [model for model in listed if model.startswith(job_id)] == [f"{job_id}@100", f"{job_id}@25"]
    newest = client.models.retrieve(job_id)
    assert (newest.id, newest.object, newest.owned_by) == (f"{job_id}@100", "model", "nanomoe")
    assert newest.created > 1_700_000_000
    assert client.models.retrieve(f"{job_id}@25").id == f"{job_id}@25"


def test_what_is_not_known_is_ignored_and_named(api: Api, client: OpenAI, job_id: str) -> None:
    raw = client.completions.with_raw_response.create(
        model=job_id, prompt="Era", max_tokens=1, frequency_penalty=0.5, user="eu", suffix=None,
        extra_body={"é": 1, "stream_options": {"include_obfuscation": False}},
    )  # fmt: skip
    assert raw.headers["x-ignored"] == "?, frequency_penalty, stream_options.include_obfuscation, user"
    assert len(raw.parse().choices) == 1
    assert "x-ignored" not in complete(api, model=job_id).headers
    assert complete(api, model=job_id, best_of=2, stream=True).headers["x-ignored"] == "best_of"


def test_openais_exceptions_tell_what_is_wrong(client: OpenAI, job_id: str) -> None:
    for model in (NOBODY, f"{job_id}@50", f"{job_id}@51", "gpt-3.5-turbo-instruct"):
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(model=model, prompt="Era")
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
        assert raised.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model=job_id, messages=[{"role": "user", "content": "Era"}])


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"prompt": ""}, 422, "invalid_request", "prompt"),
        ({"prompt": ["a", "b"]}, 422, "invalid_request", "prompt"),
        ({"model": None}, 422, "invalid_request", "model"),
        ({"max_tokens": 0}, 422, "invalid_request", "max_tokens"),
        ({"max_tokens": 5000}, 422, "max_tokens_too_large", "max_tokens"),
        ({"temperature": "hot"}, 422, "invalid_request", "temperature"),
        ({"echo": True, "logprobs": 1}, 422, "echo_with_logprobs", "echo"),
        ({"logprobs": 6}, 422, "invalid_request", "logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_an_error_of_openais(
    api: Api, job_id: str, stream: bool, changes: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = complete(api, **({"model": job_id, "stream": stream} | changes))
    error = answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_every_error_under_v1_has_openais_shape(api: Api) -> None:
    wanted = [
        (api.http.get("/v1/nothing"), 404, "not_found"),
        (api.http.delete("/v1/models"), 405, "method_not_allowed"),
        (api.http.get("/v1/models", headers={"Host": "evil.example"}), 403, "host_not_allowed"),
        (api.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}), 400,
         "invalid_body"),
    ]  # fmt: skip
    for answer, status, code in wanted:
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_is_the_newest_of_its_models_that_is_whole(api: Api, tmp_path: Path, stream: bool) -> None:
    claim = api.claim(api.submit()["id"])
    for percent in (0, 25):
        # Other models than in the other tests: what is loaded already is not read again.
        files = tiny_files(tmp_path / str(percent), seed=100 + 10 * stream + percent)
        api.record_checkpoint(claim, percent, percent, files)
    damage(api, claim.job_id, 25)
    answer = complete(api, model=claim.job_id, stream=stream)
    first = json.loads(answer.text.split("\n")[0].removeprefix("data: ")) if stream else answer.json()
    assert (answer.status_code, first["model"]) == (200, f"{claim.job_id}@0")
    named = complete(api, model=f"{claim.job_id}@25", stream=stream)
    assert (named.status_code, named.json()["error"]["code"]) == (409, "checkpoint_damaged")


def test_a_full_queue_is_a_rate_limit(serve: Serve, tmp_path: Path) -> None:
    api = serve(engine_max_waiting=0)
    api.fill_generation()
    with OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model=api.running().job_id, prompt="Era", stream=True)
        assert raised.value.type == "rate_limit_error"
        assert int(raised.value.response.headers["retry-after"]) > 0


def test_an_engine_that_dies_half_way_ends_the_stream_with_an_error(api: Api, client: OpenAI, job_id: str) -> None:
    stream = client.completions.create(model=job_id, prompt="Era", max_tokens=4000, stream=True)
    next(stream)
    process = api.context.generation._process
    assert process is not None
    process.kill()
    with pytest.raises(openai.APIError, match="generation engine ended"):
        list(stream)
