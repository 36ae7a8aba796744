"""`/score` and `/inspect` through a real server, its engine process, the clients and the command line."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nanomoe.evaluation.attention import inspect
from nanomoe.evaluation.score import losses_of_tokens
from nanomoe.model.gpt import GPT
from nanomoe.tokenizer import load_tokenizer
from service.client import AsyncClient, Client
from service.jobs import queue
from tests.api import TEXT, Api
from tests.service.http.routes.test_generate import damage
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint

SCORED = "Ontem o gato dorme no sofá. 🐈"


@pytest.fixture(scope="module")
def api(generating_api: Api) -> Api:
    return generating_api


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", use_moe=True, n_experts=4)


def files_of(checkpoint: TinyCheckpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.folder.iterdir() if path.name != "manifest.json"}


def recorded(api: Api, checkpoint: TinyCheckpoint) -> str:
    """The id of a job that trained on `TEXT`, with this checkpoint at 25 percent."""
    claim = api.claim(api.submit()["id"])
    api.record_checkpoint(claim, 25, 125, files_of(checkpoint))
    queue.finish(api.db, claim, "succeeded")
    return claim.job_id


@pytest.fixture(scope="module")
def job_id(api: Api, tiny: TinyCheckpoint) -> str:
    """A job whose checkpoint is a random mixture of experts."""
    return recorded(api, tiny)


@pytest.fixture(scope="module")
def model(tiny: TinyCheckpoint) -> GPT:
    built = GPT.build(tiny.config, tiny.tokenizer.vocab_size)
    built.load_state_dict(tiny.weights)
    return built


def test_a_text_is_scored_as_the_model_scores_it(api: Api, job_id: str, model: GPT, tiny: TinyCheckpoint) -> None:
    answer = api.http.post("/score", json={"job_id": job_id, "text": SCORED}).json()
    tokens = tiny.tokenizer.encode(SCORED)
    losses = losses_of_tokens(model, tokens)
    assert (answer["job_id"], answer["checkpoint"], answer["n_tokens"]) == (job_id, 25, len(tokens))
    assert [one["token"] for one in answer["tokens"]] == tokens
    assert [one["byte_offset"] for one in answer["tokens"]] == list(range(len(tokens)))
    assert answer["tokens"][0]["loss"] is None
    assert [one["loss"] for one in answer["tokens"][1:]] == pytest.approx(losses, rel=1e-4)
    total = sum(losses)
    assert answer["total_loss"] == pytest.approx(total, rel=1e-5)
    assert answer["loss"] == pytest.approx(total / len(losses), rel=1e-5)
    assert answer["perplexity"] == pytest.approx(math.exp(total / len(losses)), rel=1e-4)
    assert answer["bits_per_byte"] == pytest.approx(total / math.log(2) / (len(SCORED.encode()) - 1), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "span"),
    [
        (SCORED, " gato dorme no sofá"),
        (TEXT, TEXT),
        ("🐈🐈", "🐈"),
        ("éé", None),  # shares a byte with í, but no character
        ("zz", None),
    ],
)
def test_the_longest_copied_span_has_complete_characters(api: Api, job_id: str, text: str, span: str | None) -> None:
    copied = api.http.post("/score", json={"job_id": job_id, "text": text}).json()["copied"]
    if span is None:
        assert copied is None
        return
    assert span in copied["text"]
    n_bytes = len(copied["text"].encode())
    assert copied["n_bytes"] == n_bytes
    for place, whole in (("start", text), ("training_start", TEXT)):
        assert whole.encode()[copied[place] :][:n_bytes].decode() == copied["text"]


def test_a_prompt_is_inspected_as_the_model_reads_it(api: Api, job_id: str, model: GPT, tiny: TinyCheckpoint) -> None:
    answer = api.http.post("/inspect", json={"job_id": job_id, "prompt": "Era uma"}).json()
    found = inspect(model, tiny.tokenizer.encode("Era uma"))
    assert "".join(one["text"] for one in answer["tokens"]) == "Era uma"
    likeliest = found.probabilities_V.topk(10)
    assert [one["token"] for one in answer["likeliest"]] == likeliest.indices.tolist()
    assert [one["probability"] for one in answer["likeliest"]] == pytest.approx(likeliest.values.tolist(), rel=1e-4)
    assert [len(layer) for layer in answer["attention"]] == [2, 2]
    for layer, heads in enumerate(answer["attention"]):
        for head, rows in enumerate(heads):
            for t, row in enumerate(rows):
                assert row == pytest.approx(found.attention_LHTT[layer, head, t, : t + 1].tolist(), abs=2e-6)
    assert [layer["layer"] for layer in answer["routing"]] == list(found.routing) == [1]
    for layer in answer["routing"]:
        routed = found.routing[layer["layer"]]
        assert layer["chosen"] == routed.chosen_TK.tolist()
        for name, expected in (
            ("logits", routed.logits_TE),
            ("probabilities", routed.probs_TE),
            ("gates", routed.gates_TK),
        ):
            torch.testing.assert_close(torch.tensor(layer[name]), expected, rtol=0, atol=2e-6)
        assert (layer["balance_bias"], layer["n_shared_experts"]) == (None, 0)
    for t, (routed, read) in enumerate(zip(answer["routed_tokens"], answer["tokens"], strict=True)):
        assert {name: routed[name] for name in read} == read
        assert routed["experts"] == [layer["chosen"][t] for layer in answer["routing"]]
        assert routed["gates"] == [layer["gates"][t] for layer in answer["routing"]]
    assert answer["n_unread"] == 0
    long = api.http.post("/inspect", json={"job_id": job_id, "prompt": "a" * 50}).json()
    assert (long["n_unread"], len(long["tokens"]), long["tokens"][0]["byte_offset"]) == (18, 32, 18)


def test_a_prompt_too_long_for_its_attention_is_routed_without(api: Api, tmp_path: Path) -> None:
    wide = write_tiny_checkpoint(tmp_path / "wide", block_size=1024, use_moe=True, router_bias_update_rate=0.1)
    job_id = recorded(api, wide)
    asked = {"job_id": job_id, "prompt": "a" * 1000}
    assert api.http.post("/inspect", json=asked).json()["code"] == "inspection_too_large"
    answer = api.http.post("/inspect", json=asked | {"attention": False}).json()
    assert answer["attention"] == []
    assert len(answer["routing"][0]["chosen"]) == len(answer["tokens"]) == 1000
    assert len(answer["routing"][0]["balance_bias"]) == wide.config.n_experts


def test_a_request_that_cannot_be_evaluated_is_refused_with_its_code(api: Api, job_id: str, tmp_path: Path) -> None:
    one = api.http.post("/score", json={"job_id": job_id, "text": "a"})
    assert (one.status_code, one.json()["code"]) == (422, "text_too_short")
    wide = recorded(api, write_tiny_checkpoint(tmp_path / "wide", block_size=1024, n_head=2))
    large = api.http.post("/inspect", json={"job_id": wide, "prompt": "a" * 1000})
    assert (large.status_code, large.json()["code"]) == (422, "inspection_too_large")
    assert "2,002,000" in large.json()["detail"]


def test_a_damaged_checkpoint_is_a_conflict(api: Api, job_id: str, tmp_path: Path) -> None:
    claim = api.claim(api.submit()["id"])
    files = {**load_tokenizer("bytes").files(), "config.json": b"{}", "model.safetensors": b"no weights"}
    api.record_checkpoint(claim, 0, 0, files)
    answer = api.http.post("/inspect", json={"job_id": claim.job_id, "prompt": "a"})
    assert (answer.status_code, answer.json()["code"]) == (503, "checkpoint_unreadable")
    for path in api.context.settings.data_dir.glob(f"jobs/{claim.job_id}/*/config.json"):
        path.write_bytes(b"[]")
    answer = api.http.post("/score", json={"job_id": claim.job_id, "text": "abc"})
    assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_damaged")


def test_latest_is_the_newest_undamaged_checkpoint(api: Api, tmp_path: Path) -> None:
    claim = api.claim(api.submit()["id"])
    for percent in (0, 25):
        tiny = write_tiny_checkpoint(tmp_path / f"{percent}", seed=7 + percent)
        api.record_checkpoint(claim, percent, percent, files_of(tiny))
    damage(api, claim.job_id, 25)
    for path, asked in (("/score", {"text": "abc"}), ("/inspect", {"prompt": "abc"})):
        newest = api.http.post(path, json={"job_id": claim.job_id} | asked)
        assert (newest.status_code, newest.json()["checkpoint"]) == (200, 0)
        named = api.http.post(path, json={"job_id": claim.job_id, "checkpoint": 25} | asked)
        assert (named.status_code, named.json()["code"]) == (409, "checkpoint_damaged")


def test_both_clients_send_the_same_requests(api: Api, job_id: str) -> None:
    async def ask() -> tuple[Any, Any]:
        async with AsyncClient(api.url) as client:
            job = await client.job(job_id)
            return await job.score(SCORED, 25), await job.inspect("Era")

    with Client(api.url) as client:
        job = client.job(job_id)
        assert asyncio.run(ask()) == (job.score(SCORED, 25), job.inspect("Era"))
