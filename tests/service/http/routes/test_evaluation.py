"""`/v1` as other people's programs use it: lm-evaluation-harness measures a checkpoint, LangChain continues prompts.

Both are imported where they are used: they take seconds, which each process of the suite would spend to collect tests.
"""

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nanomoe.checkpoint import MANIFEST
from nanomoe.model.gpt import GPT
from service.jobs import queue
from tests.api import Api
from tests.documents import ROOT
from tests.markdown import blocks, differences
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint

if TYPE_CHECKING:
    from langchain_openai import OpenAI

DOCUMENT = ROOT / "docs" / "openai.md"

LINE_FEED = 10
"""The token that stands before a text which has nothing before it."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def _recorded(api: Api, tiny: TinyCheckpoint) -> str:
    """The id of a new job with this checkpoint at 100 percent."""
    claim = api.claim(api.submit()["id"])
    files = {path.name: path.read_bytes() for path in tiny.folder.iterdir() if path.name != MANIFEST}
    api.record_checkpoint(claim, 100, 500, files)
    queue.finish(api.db, claim, "succeeded")
    return claim.job_id


@pytest.fixture(scope="module")
def job_id(api: Api, tiny: TinyCheckpoint) -> str:
    """A job with a random model of bytes."""
    return _recorded(api, tiny)


# lm-evaluation-harness


def _greedy(tiny: TinyCheckpoint, context: str) -> str:
    """Four tokens, each the likeliest; those of this model are ASCII."""
    model, tokens = _model(tiny), list(context.encode())
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens])).logits_BTV[0, -1].argmax()))
    return bytes(tokens[-4:]).decode("ascii")


def _model(tiny: TinyCheckpoint) -> GPT:
    model = GPT.build(tiny.config, tiny.tokenizer.vocab_size)
    model.load_state_dict(tiny.weights)
    return model.eval()


@torch.no_grad()
def _loglikelihood(tiny: TinyCheckpoint, context: bytes, continuation: bytes) -> tuple[float, bool]:
    """ln of the probability of `continuation` after `context`, and whether each of its tokens is the likeliest."""
    tokens = torch.tensor([*context, *continuation])
    logprobs_TV = _model(tiny)(tokens[None]).logits_BTV[0].log_softmax(-1)[len(context) - 1 : -1]
    targets_T = tokens[len(context) :]
    chosen = logprobs_TV.gather(1, targets_T[:, None]).sum().item()
    return chosen, bool((logprobs_TV.argmax(-1) == targets_T).all())


@pytest.fixture(scope="module")
def lines(tiny: TinyCheckpoint) -> list[dict[str, Any]]:
    """The whole task: what follows each context, and which of it is right."""
    return [
        {"context": "O rato roeu a", "choices": [" roupa", " rolha", " lua"], "answer": 0},
        {"context": "Era uma", "choices": [" vez", " noz", " 🐈"], "answer": 2},
        {"context": "O gato", "choices": [" dorme", _greedy(tiny, "O gato"), " x"], "answer": 1},
    ]


@pytest.fixture(scope="module")
def tokenizer_folder(api: Api, job_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's files, downloaded from the checkpoint."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        answer = api.http.get(f"/jobs/{job_id}/checkpoints/100/files/{name}")
        (folder / name).write_bytes(answer.content)
    return folder


def _tasks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each kind of question that the harness asks a model."""
    import datasets

    rows = datasets.Dataset.from_list(lines)
    common = {"dataset_path": "in memory", "custom_dataset": lambda **_: {"test": rows}, "test_split": "test"}
    choose = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    read = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}"}
    add = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 4}}
    return [
        {"task": "choose", "doc_to_text": "{{context}}", "target_delimiter": "", **choose, **common},
        {"task": "read", "metric_list": [{"metric": "word_perplexity"}], **read, **common},
        {"task": "add", "doc_to_text": "{{context}}", "doc_to_target": "{{choices[1]}}",
         "metric_list": [{"metric": "exact_match"}], **add, **common},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("batch_size", "how"),
    [
        (1, {"tokenized_requests": True}),
        (4, {"tokenized_requests": True}),
        (4, {"tokenized_requests": False, "num_concurrent": 2}),
    ],
)
def test_the_evaluation_harness_finds_what_the_model_itself_says(
    api: Api, job_id: str, tiny: TinyCheckpoint, lines: list[dict[str, Any]], tokenizer_folder: Path,
    batch_size: int, how: dict[str, Any],
) -> None:  # fmt: skip
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = {
        "model": f"{job_id}@100",
        "base_url": f"{api.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tokenizer_folder),
        "max_length": tiny.config.block_size,
        "custom_prefix_token_id": LINE_FEED,
        **how,
    }
    found = simple_evaluate(
        "local-completions", model, tasks=_tasks(lines), batch_size=batch_size, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    answers = {task: [sample["filtered_resps"] for sample in samples] for task, samples in found["samples"].items()}
    for line, choices, whole, added in zip(lines, answers["choose"], answers["read"], answers["add"], strict=True):
        context = line["context"].encode()
        wanted = [_loglikelihood(tiny, context, choice.encode()) for choice in line["choices"]]
        assert [greedy for _, greedy in choices] == [greedy for _, greedy in wanted]
        assert [chosen for chosen, _ in choices] == pytest.approx([chosen for chosen, _ in wanted], rel=1e-4)
        assert whole == pytest.approx([_loglikelihood(tiny, b"\n", context)[0]], rel=1e-4)
        assert added == [_greedy(tiny, line["context"])]
    assert answers["choose"][2][1][1], "the model's own continuation is its likeliest"
    results = found["results"]
    best = [max(range(3), key=lambda n, told=told: told[n][0]) for told in answers["choose"]]  # type: ignore[misc]
    right = sum(one == line["answer"] for one, line in zip(best, lines, strict=True))
    assert results["choose"]["acc,none"] == pytest.approx(right / 3)
    assert results["add"]["exact_match,none"] == pytest.approx(1 / 3)


# LangChain


@pytest.fixture(scope="module")
def llm(api: Api, job_id: str) -> "OpenAI":
    from langchain_openai import OpenAI

    return OpenAI(
        model=f"{job_id}@100", base_url=f"{api.url}/v1", api_key="none", temperature=0.8, seed=3, max_tokens=9
    )


PROMPTS = ["Era uma vez", "O gato", "É 🐈"]


def _texts(api: Api, job_id: str, **request: Any) -> list[str]:
    answer = api.http.post("/v1/completions", json={"model": job_id, "temperature": 0.8, "seed": 3} | request).json()
    return [choice["text"] for choice in answer["choices"]]


def test_langchain_continues_a_batch_of_prompts_in_one_request(api: Api, job_id: str, llm: "OpenAI") -> None:
    wanted = _texts(api, job_id, prompt=PROMPTS, max_tokens=9)
    assert [generations[0].text for generations in llm.generate(PROMPTS).generations] == wanted
    assert llm.batch(PROMPTS) == wanted
    assert llm.invoke(PROMPTS[0]) == wanted[0]


def test_langchain_has_several_continuations_of_each_prompt(api: Api, job_id: str, llm: "OpenAI") -> None:
    several = llm.model_copy(update={"n": 2, "best_of": 2})
    told = several.generate(PROMPTS)
    assert [one.text for generations in told.generations for one in generations] == _texts(
        api, job_id, prompt=PROMPTS, max_tokens=9, n=2
    )
    assert told.llm_output is not None
    assert told.llm_output["token_usage"]["prompt_tokens"] == sum(len(prompt.encode()) for prompt in PROMPTS)


def test_langchain_streams_and_stops(api: Api, job_id: str, llm: "OpenAI") -> None:
    (whole,) = _texts(api, job_id, prompt="O gato", max_tokens=9)
    assert "".join(llm.stream("O gato")) == whole
    assert llm.invoke("O gato", stop=[whole[3:5]]) == whole[: whole.index(whole[3:5])]


# The documentation


@pytest.fixture(scope="module")
def words_job_id(api: Api, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job with a random model of the bundled tokenizer's tokens; the newest job."""
    folder = tmp_path_factory.mktemp("words") / "checkpoint"
    tiny = write_tiny_checkpoint(folder, tokenizer="ptbr-8k", block_size=100)
    return _recorded(api, tiny)


def test_what_the_documentation_shows_runs_and_answers_so(
    api: Api, words_job_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = f"{words_job_id}@100"
    shown = [block for block in blocks(DOCUMENT.read_text("utf-8")) if block.is_run]
    assert [block.language for block in shown] == ["sh", "sh", "sh", "python", "sh", "python"]
    for block in shown:
        script = block.text.replace("http://127.0.0.1:8000", api.url)
        if block.language == "python":
            exec(compile(script, DOCUMENT, "exec"), {"MODEL": model})  # noqa: S102 - it is ours
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{script}\necho $MODEL >&2"],
            env={**os.environ, "MODEL": model}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == f"{model}\n"
        if block.answer is not None:
            assert differences(block.answer, done.stdout) == []
