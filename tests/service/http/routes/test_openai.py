"""`/v1` as OpenAI's own client library uses it, and its errors as they are on the wire."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.api import Api, Serve
from tests.service.http.routes.test_generate import damage, generate
from tests.service.tiny_checkpoint import tiny_files

if TYPE_CHECKING:
    from openai import OpenAI

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def api(generating_api: Api) -> Api:
    return generating_api


@pytest.fixture(scope="module")
def client(api: Api) -> "Iterator[OpenAI]":
    from openai import OpenAI  # not on top: every process that collects this file would pay for it

    with OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(api: Api, **body: Any) -> httpx.Response:
    return api.http.post("/v1/completions", json={"prompt": "Era uma vez"} | body)


def test_a_completion_is_the_same_text_as_generate_gives(api: Api, client: "OpenAI", job_id: str) -> None:
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


def test_defaults_are_openais_and_null_means_them(api: Api, client: "OpenAI", job_id: str) -> None:
    left_out = client.completions.create(model=job_id, prompt="Era", seed=1)
    null = client.completions.create(
        model=job_id, prompt="Era", seed=1, max_tokens=None, temperature=None, n=None, stop=None, logprobs=None
    )
    wanted = generate(api, job_id=job_id, prompt="Era", max_new_tokens=16, seed=1).json()
    assert left_out.choices[0].text == null.choices[0].text == wanted["choices"][0]["text"]
    assert left_out.model == f"{job_id}@100"


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_plain_answer(client: "OpenAI", job_id: str, echo: bool) -> None:
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


def test_usage_comes_last_where_it_is_asked_for(client: "OpenAI", job_id: str) -> None:
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
def test_a_text_ends_before_a_stop_string(client: "OpenAI", job_id: str, several: bool) -> None:
    request: dict[str, Any] = {"model": job_id, "prompt": "Era", "max_tokens": 30, "seed": 1}
    whole = client.completions.create(**request).choices[0].text
    stop = whole[9:12]
    (choice,) = client.completions.create(**request, stop=["never said", stop] if several else stop).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_logprobs_tell_tokens_rivals_and_offsets(client: "OpenAI", job_id: str) -> None:
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
    for field in ("tokens", "text_offset"):
        joined = [one for piece in streamed for one in getattr(piece.logprobs, field)]
        assert joined == getattr(told, field)
    # The loops may have become ready between the two requests: they differ from tensor operations in the last bits.
    logprobs = [one for piece in streamed for one in piece.logprobs.token_logprobs]
    assert logprobs == pytest.approx(told.token_logprobs, abs=1e-5)
    likeliest = [one for piece in streamed for one in piece.logprobs.top_logprobs]
    for rivals, others in zip(told.top_logprobs, likeliest, strict=True):
        assert others == pytest.approx(rivals, abs=1e-5)


def test_models_are_the_recorded_checkpoints(client: "OpenAI", job_id: str) -> None:
    listed = [model.id for model in client.models.list()]
    assert [model for model in listed if model.startswith(job_id)] == [f"{job_id}@100", f"{job_id}@25"]
    newest = client.models.retrieve(job_id)
    assert (newest.id, newest.object, newest.owned_by) == (f"{job_id}@100", "model", "nanomoe")
    assert newest.created > 1_700_000_000
    assert client.models.retrieve(f"{job_id}@25").id == f"{job_id}@25"


def test_what_is_not_known_is_ignored_and_named(api: Api, client: "OpenAI", job_id: str) -> None:
    raw = client.completions.with_raw_response.create(
        model=job_id, prompt="Era", max_tokens=1, frequency_penalty=0.5, user="eu", suffix=None,
        extra_body={"é": 1, "stream_options": {"include_obfuscation": False}},
    )  # fmt: skip
    assert raw.headers["x-ignored"] == "?, frequency_penalty, stream_options.include_obfuscation, user"
    assert len(raw.parse().choices) == 1
    assert "x-ignored" not in complete(api, model=job_id).headers
    assert complete(api, model=job_id, best_of=2, stream=True).headers["x-ignored"] == "best_of"


def test_openais_client_raises_the_matching_exceptions(client: "OpenAI", job_id: str) -> None:
    import openai

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
        ({"prompt": ""}, 422, "empty_prompt", "prompt"),
        ({"model": None}, 422, "invalid_request", "model"),
        ({"max_tokens": 5000}, 422, "max_tokens_too_large", "max_tokens"),
        ({"temperature": "hot"}, 422, "invalid_request", "temperature"),
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
def test_a_job_id_stands_for_its_newest_undamaged_checkpoint(api: Api, tmp_path: Path, stream: bool) -> None:
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


def test_a_full_queue_is_a_rate_limit(serve: Serve) -> None:
    import openai

    api = serve(engine_max_waiting=0)
    api.fill_generation()
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model=api.running().job_id, prompt="Era", stream=True)
        assert raised.value.type == "rate_limit_error"
        assert int(raised.value.response.headers["retry-after"]) > 0


def test_an_engine_that_dies_half_way_ends_the_stream_with_an_error(api: Api, client: "OpenAI", job_id: str) -> None:
    import openai

    stream = client.completions.create(model=job_id, prompt="Era", max_tokens=4000, stream=True)
    next(stream)
    process = api.context.generation._engine._process
    assert process is not None
    process.kill()
    with pytest.raises(openai.APIError, match="generation engine ended"):
        list(stream)


# Several prompts, and prompts of token ids


def token_ids(text: str) -> list[int]:
    """As the tiny model's tokenizer has them: its bytes."""
    return list(text.encode())


TEXTS = ["Era uma vez", "O gato", "É 🐈"]


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_of_a_list_has_the_text_that_it_has_alone(
    client: "OpenAI", job_id: str, as_tokens: bool, stream: bool
) -> None:
    request: dict[str, Any] = {"model": job_id, "n": 2, "seed": 7, "max_tokens": 9}
    alone = [client.completions.create(**request, prompt=text) for text in TEXTS]
    prompts: Any = [token_ids(text) for text in TEXTS] if as_tokens else TEXTS
    if stream:
        texts = [""] * 6
        for chunk in client.completions.create(**request, prompt=prompts, stream=True):
            for piece in chunk.choices:
                texts[piece.index] += piece.text
    else:
        together = client.completions.create(**request, prompt=prompts)
        assert [choice.index for choice in together.choices] == list(range(6))
        texts = [choice.text for choice in together.choices]
        assert together.usage is not None
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(together.usage, name) == sum(getattr(one.usage, name) for one in alone)
    assert texts == [choice.text for one in alone for choice in one.choices]


@pytest.mark.parametrize("prompt", [["Era uma vez"], token_ids("Era uma vez"), [token_ids("Era uma vez")]])
def test_one_prompt_may_be_written_in_several_ways(client: "OpenAI", job_id: str, prompt: Any) -> None:
    request: dict[str, Any] = {"model": job_id, "seed": 1, "echo": True, "logprobs": 1, "max_tokens": 3}
    wanted = client.completions.create(**request, prompt="Era uma vez")
    answer = client.completions.create(**request, prompt=prompt)
    assert (answer.choices, answer.usage) == (wanted.choices, wanted.usage)


def test_without_a_seed_equal_prompts_have_different_texts(client: "OpenAI", job_id: str) -> None:
    answer = client.completions.create(model=job_id, prompt=["Era"] * 4, max_tokens=12)
    assert len({choice.text for choice in answer.choices}) > 1


def test_more_prompts_than_can_run_at_once_are_served_in_turn(serve: Serve, tmp_path: Path) -> None:
    api = serve(engine_max_running=2, engine_max_waiting=0)
    claim = api.running()
    api.record_checkpoint(claim, 25, 25, tiny_files(tmp_path / "tiny"))
    prompts = [f"Era {n}" for n in range(9)]
    answer = complete(api, model=claim.job_id, prompt=prompts, max_tokens=3, seed=1, echo=True)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(9))
    assert all(choice["text"].startswith(prompt) for choice, prompt in zip(choices, prompts, strict=True))
    too_many = complete(api, model=claim.job_id, prompt=["a"] * 200, n=2, max_tokens=4096)
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (422, "too_many_tokens")
    api.fill_generation()
    refused = complete(api, model=claim.job_id, prompt=prompts, max_tokens=3)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "generation_queue_full")


# The prompt's own tokens


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("prompt", ["Era", "É uma vez, um gato que sabia de cor 🐈 e nada mais", "a"])
def test_with_echo_the_prompts_own_log_probabilities_are_those_of_score(
    api: Api, client: "OpenAI", job_id: str, prompt: str, max_tokens: int
) -> None:
    (choice,) = client.completions.create(
        model=job_id, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2, temperature=0
    ).choices
    assert choice.text.startswith(prompt)
    assert choice.logprobs is not None
    first, *others = choice.logprobs.token_logprobs or ()
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    n_prompt = len(token_ids(prompt))
    assert first is None
    assert (choice.logprobs.top_logprobs or [{}])[0] is None
    assert len(tokens) == len(offsets) == 1 + len(others) == n_prompt + max_tokens
    if n_prompt > 1:
        scored = api.http.post("/score", json={"job_id": job_id, "text": prompt}).json()["tokens"]
        assert others[: n_prompt - 1] == pytest.approx([-one["loss"] for one in scored[1:]], rel=1e-4)
    for token, logprob, rivals in zip(tokens[1:], others, (choice.logprobs.top_logprobs or [])[1:], strict=True):
        assert rivals[token] == logprob
        assert len(rivals) in (2, 3)
    # The prompt's characters, then the continuation's.
    starts = [n for n, character in enumerate(prompt) for _ in character.encode()]
    assert offsets[:n_prompt] == starts
    assert (choice.text if max_tokens == 0 else choice.text[: offsets[n_prompt]]) == prompt


def test_a_continuation_is_as_likely_when_it_is_echoed(client: "OpenAI", job_id: str) -> None:
    """Prompt and continuation, sent back as a prompt, have the log-probabilities that the continuation had."""
    ascii_only: dict[str, Any] = {"model": job_id, "prompt": token_ids("Era uma"), "max_tokens": 12, "logprobs": 0}
    (made,) = client.completions.create(**ascii_only, temperature=0, echo=True).choices
    assert made.logprobs is not None
    named = [bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) if name.startswith("bytes:")
             else name.encode() for name in made.logprobs.tokens or ()]  # fmt: skip
    (read,) = client.completions.create(
        model=job_id, prompt=list(b"".join(named)), max_tokens=0, logprobs=0, echo=True
    ).choices
    assert read.logprobs is not None
    assert (read.text, read.logprobs.tokens) == (made.text, made.logprobs.tokens)
    assert read.logprobs.token_logprobs is not None
    assert read.logprobs.token_logprobs[1:] == pytest.approx((made.logprobs.token_logprobs or [])[1:], abs=1e-4)


def test_with_max_tokens_0_nothing_is_added(client: "OpenAI", job_id: str) -> None:
    answer = client.completions.create(model=job_id, prompt=["Era", "uma vez"], max_tokens=0, n=2)
    told = [(choice.index, choice.text, choice.finish_reason, choice.logprobs) for choice in answer.choices]
    assert told == [(index, "", "length", None) for index in range(4)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 0)
    chunks = list(client.completions.create(
        model=job_id, prompt="Era", max_tokens=0, echo=True, logprobs=0, stream=True
    ))  # fmt: skip
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [("Era", "length")]
    assert chunks[0].choices[0].logprobs is not None
    assert chunks[0].choices[0].logprobs.tokens == ["E", "r", "a"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_token_figures_end_where_a_stop_string_cut_the_text(
    client: "OpenAI", job_id: str, stream: bool, echo: bool
) -> None:
    request: dict[str, Any] = {"model": job_id, "prompt": "Era", "max_tokens": 40, "seed": 2, "logprobs": 1}
    whole = client.completions.create(**request).choices[0]
    assert whole.logprobs is not None
    at = 12
    stop = whole.text[at : at + 4]
    answer = client.completions.create(**request, echo=echo, stop=stop, stream=stream)
    pieces: list[Any] = [one for chunk in answer for one in chunk.choices] if stream else answer.choices
    text = "".join(piece.text for piece in pieces)
    assert text == ("Era" if echo else "") + whole.text[: whole.text.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    told = {field: [one for piece in pieces for one in getattr(piece.logprobs, field)]
            for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}  # fmt: skip
    assert {len(values) for values in told.values()} == {len(told["tokens"])}
    assert told["text_offset"][-1] < len(text)
    kept = [offset for offset in whole.logprobs.text_offset or () if offset < whole.text.index(stop)]
    shift = len("Era") if echo else 0
    assert told["text_offset"][shift:] == [offset + shift for offset in kept]
    assert told["tokens"][shift:] == (whole.logprobs.tokens or [])[: len(kept)]


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": [""]}, "empty_prompt", "prompt.0"),
        ({"prompt": ["a", ""]}, "empty_prompt", "prompt.1"),
        ({"prompt": [[97], []]}, "empty_prompt", "prompt.1"),
        ({"prompt": [97, 256]}, "token_unknown", "prompt.1"),
        ({"prompt": [[97], [97, 98, 256]]}, "token_unknown", "prompt.1.2"),
        ({"prompt": [[97], [97, 98, 256]], "max_tokens": 0}, "token_unknown", "prompt.1.2"),
        ({"prompt": [97, 256], "echo": True}, "token_unknown", "prompt.1"),
        ({"prompt": [97, -1]}, "invalid_request", "prompt.1"),
        ({"prompt": ["a", 1]}, "invalid_request", "prompt.1"),
        ({"prompt": [1, "a"]}, "invalid_request", "prompt.1"),
        ({"prompt": [[1], "a"]}, "invalid_request", "prompt.1"),
        ({"prompt": [[1], ["a"]]}, "invalid_request", "prompt.1.0"),
        ({"prompt": [True]}, "invalid_request", "prompt.0"),
        ({"prompt": {"text": "a"}}, "invalid_request", "prompt"),
        ({"prompt": ["a"] * 2049}, "invalid_request", "prompt"),
        ({"prompt": ["a"] * 1025, "n": 2}, "too_many_choices", "prompt"),
        ({"prompt": "a" * 16_385, "echo": True, "logprobs": 0}, "prompt_too_long", "prompt"),
        ({"prompt": "a" * 1_000_000, "n": 17, "echo": True}, "prompt_too_long", "prompt"),
        ({"n": 65}, "n_too_large", "n"),
        ({"stop": [""]}, "invalid_request", "stop.0"),
        ({"stop": ""}, "invalid_request", "stop"),
        ({"stop": ["a"] * 17}, "invalid_request", "stop"),
        ({"stop": ["a", "b" * 201]}, "invalid_request", "stop.1"),
        ({"stop": 1}, "invalid_request", "stop"),
    ],
)
def test_a_fault_in_a_list_is_named(api: Api, job_id: str, changes: dict[str, Any], code: str, param: str) -> None:
    answer = complete(api, **{"model": job_id, "max_tokens": 1} | changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, param), error


@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/inspect"])
def test_an_empty_prompt_is_refused_with_its_own_code(api: Api, job_id: str, path: str) -> None:
    answer = api.http.post(path, json={"model" if path.startswith("/v1") else "job_id": job_id, "prompt": ""}).json()
    told = answer.get("error", answer)
    assert told["code"] == "empty_prompt"
    assert "no token that stands for the start of a text" in told.get("message", told.get("detail"))


def test_invalid_stop_strings_are_refused_with_a_message(api: Api, job_id: str) -> None:
    def message(stop: Any) -> str:
        return str(complete(api, model=job_id, stop=stop).json()["error"]["message"])

    assert message([""]) == "body.stop.0: String should have at least 1 character"
    assert message(["a"] * 17) == "body.stop: List should have at most 16 items after validation, not 17"
    assert message(["a" * 201]) == "body.stop.0: String should have at most 200 characters"
    assert message(5) == "body.stop: Input should be a string or a list of strings"
