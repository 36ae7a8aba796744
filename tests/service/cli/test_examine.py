"""`nanomoe score`, `inspect` and `explain` against a real server, and `explain` of a folder."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from nanomoe import checkpoint
from nanomoe.evaluation.metrics import CardToken, MixtureLayer
from service.cli.inspection_text import experts_table
from service.client import JobHandle
from service.jobs import queue
from tests.api import TEXT, Api
from tests.service.cli.conftest import Run
from tests.service.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def job_id(api: Api, tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", use_moe=True, n_experts=4)
    claim = api.claim(api.submit()["id"])
    files = {path.name: path.read_bytes() for path in tiny.folder.iterdir() if path.name != "manifest.json"}
    api.record_checkpoint(claim, 25, 125, files)
    queue.finish(api.db, claim, "succeeded")
    return claim.job_id


def test_a_text_is_scored_and_its_copied_span_shown(nanomoe: Run, api: Api, job_id: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Ontem o rato rói a roupa", encoding="utf-8")
    shown = nanomoe("score", f"{job_id}@25", "text.txt", "--url", api.url)
    assert shown.code == 0, shown.err
    assert "Ontem o rato rói a roupa" in shown.out
    assert "25 tokens, loss " in shown.out
    assert "copied from the training text: 20 bytes, from byte 5, there from 24" in " ".join(shown.out.split())
    as_json = nanomoe("score", job_id, "-", "--url", api.url, "--json", stdin=TEXT.encode())
    assert as_json.json["copied"]["text"] == TEXT
    strange = nanomoe("score", job_id, "-", "--url", api.url, stdin="§§".encode())
    assert "no part of it occurs in the training text" in strange.out
    assert nanomoe("score", job_id, "-", "--url", api.url, stdin=b"a").err.startswith("nanomoe: text_too_short")


def test_a_prompt_is_inspected(nanomoe: Run, api: Api, job_id: str) -> None:
    shown = nanomoe("inspect", job_id, "Era", "--url", api.url)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    (of_attention,) = (n for n, line in enumerate(lines) if "'a' attends to" in line)
    (of_router,) = (n for n, line in enumerate(lines) if line.startswith("read and sent to experts"))
    assert lines[0].split() == ["after", "'a'", "id", "probability"]
    assert of_attention == 11, "ten next tokens below their heading"
    assert of_router - of_attention == 5, "two layers of two heads"
    answer = nanomoe("inspect", job_id, "Era", "--url", api.url, "--json").json
    assert len(answer["likeliest"]) == 10
    (layer,) = answer["routing"]
    assert [line.split() for line in lines[of_router + 1 :]] == [
        [repr(letter), f"{first},", str(second)] for letter, (first, second) in zip("Era", layer["chosen"], strict=True)
    ]


def test_every_token_of_a_prompt_is_shown_with_its_experts(nanomoe: Run, api: Api, job_id: str) -> None:
    prompt = "Era uma vez um gato que"
    answer = nanomoe("inspect", job_id, prompt, "--url", api.url, "--json").json
    lines = nanomoe("inspect", job_id, prompt, "--url", api.url).out.splitlines()
    (of_router,) = (n for n, line in enumerate(lines) if line.startswith("read and sent to experts"))
    assert len(lines[of_router + 1 :]) == len(prompt) == len(answer["routed_tokens"])
    for line, letter, routed in zip(lines[of_router + 1 :], prompt, answer["routed_tokens"], strict=True):
        assert line.split("  ")[0] == repr(letter) == repr(routed["text"])
        assert line.rstrip().endswith(", ".join(map(str, routed["experts"][0])))


def test_the_experts_of_a_checkpoint_are_shown_with_their_tokens(nanomoe: Run, api: Api) -> None:
    claim = api.running(config={"tokenizer": "bytes", "use_moe": True, "n_experts": 2, "k": 1})
    cards = [[{"token": " uma", "id": 7, "times": 12}, {"token": "\n", "id": 9, "times": 3}], []]
    layer = {"layer": 1, "load": [0.75, 0.25], "importance": [0.6, 0.4], "loss_without": [3.5, 2.25], "cards": cards}
    several = {"layer": 3, "load": [1.0, 0.0], "importance": [0.5, 0.5], "cards": cards}
    api.record_checkpoint(claim, 25, 125, moe={"layers": [layer, several], "mean": {}, "max": {}})
    queue.finish(api.db, claim, "succeeded")
    for target in (f"{claim.job_id}@25", claim.job_id):
        done = nanomoe("experts", target, "--url", api.url)
        assert done.code == 0, done.err
        assert [line.split() for line in done.out.splitlines()] == [
            [
                f"{claim.job_id}@25",
                *["loss", "2.0000,", "k", "=", "1", "of", "2", "experts:", "an", "equal", "load", "is", "0.5000"],
            ],
            [],
            ["layer", "1", "expert", "load", "importance", "loss", "without", "top", "tokens"],
            ["0", "0.7500", "0.6000", "3.5000", "'", "uma'", "12,", r"'\n'", "3"],
            ["1", "0.2500", "0.4000", "2.2500", "–"],
            [],
            ["layer", "3", "expert", "load", "importance", "loss", "without", "top", "tokens"],
            ["0", "1.0000", "0.5000", "–", "'", "uma'", "12,", r"'\n'", "3"],
            ["1", "0.0000", "0.5000", "–", "–"],
        ]
    told = nanomoe("experts", claim.job_id, "--url", api.url, "--json").json
    assert told["layers"][0]["cards"] == cards
    for target, said in (
        (f"{claim.job_id}@50", "checkpoint_not_found: "),
        (api.finished(), "is dense, it has no experts: train one with --set use_moe=true"),
    ):
        refused = nanomoe("experts", target, "--url", api.url)
        assert (refused.code, refused.out) == (2, "")
        assert said in refused.err


def test_the_tokens_of_an_expert_fit_into_the_terminal() -> None:
    card = [CardToken(token=f"t{n}", id=n, times=n) for n in range(9)]
    layer = MixtureLayer(layer=1, load=[1.0], importance=[1.0], loss_without=[1.0], cards=[card])
    console = Console(width=80, file=StringIO())
    console.print(experts_table(layer, console.width))
    _, row = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert row.rstrip().endswith("'t0' 0, 't1' 1, 't2' 2")


@pytest.mark.parametrize(
    ("knobs", "origin"),
    [
        ({}, "each probability over the sum of the chosen ones"),
        ({"norm_topk_prob": False}, "the probabilities as they are"),
        ({"norm_topk_prob": False, "router_score": "sigmoid"}, "the sigmoid of each logit"),
    ],
    ids=["renormalised", "softmax", "sigmoid"],
)
def test_explain_shows_the_numbers_that_the_gates_come_from(
    nanomoe: Run, tmp_path: Path, knobs: dict[str, object], origin: str
) -> None:
    write_tiny_checkpoint(tmp_path / "mixture", use_moe=True, n_experts=4, k=2, **knobs)
    told = nanomoe("explain", "mixture", "Era uma vez", "--json").json
    assert (told["token"], told["token_id"], told["position"]) == ("z", ord("z"), 10)
    assert told["predicted"]
    (layer,) = told["layers"]
    chosen = [layer["experts"][expert] for expert in layer["chosen"]]
    assert layer["gate_sum"] == pytest.approx(sum(score["gate"] for score in chosen))

    done = nanomoe("explain", "mixture", "Era uma vez")
    assert (done.code, done.err) == (0, "")
    first, second, _, header, *rows, total, gates = done.out.splitlines()
    assert first == f"reads 'z' (id 122, position 10), routes it, and predicts {told['predicted']!r} to follow"
    assert second.startswith("k = 2 of 4 experts")
    assert header.split() == ["layer", "1", "expert", "logit", "probability", "choice", "gate"]
    for score, row in zip(layer["experts"], rows, strict=True):
        choice = str(layer["chosen"].index(score["expert"]) + 1) if score["gate"] is not None else "–"
        gate = "–" if score["gate"] is None else f"{score['gate']:.4f}"
        numbers = [f"{score['logit']:,.4f}", f"{score['probability']:.4f}"]
        assert row.split() == [str(score["expert"]), *numbers, choice, gate]
    assert total.split() == ["sum", "1.0000", f"{layer['gate_sum']:.4f}"]
    assert gates.endswith(f"({origin})")
    for score in chosen:
        assert f"{score['gate']:.4f}" in gates


def test_explain_asks_the_service_about_the_checkpoint_of_a_job(
    nanomoe: Run, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOMOE_URL", api.url)
    made = write_tiny_checkpoint(tmp_path / "mixture", use_moe=True, router_bias_update_rate=0.1, n_shared_experts=1)
    files = {path.name: path.read_bytes() for path in made.folder.iterdir() if path.name != checkpoint.MANIFEST}
    claim = api.running(config={"tokenizer": "bytes", "use_moe": True, "n_shared_experts": 1})
    api.record_checkpoint(claim, 50, 250, files)
    here = nanomoe("explain", "mixture", "Era", "--json")

    def no_download(*_: object) -> None:
        raise AssertionError("the weights stay where they are")

    monkeypatch.setattr(JobHandle, "download_checkpoint", no_download)
    monkeypatch.setattr("service.generation.examiner.LoadedModel.load", no_download)
    assert nanomoe("explain", f"{claim.job_id}@50", "Era", "--json").json == here.json
    assert "; 1 shared beside them" in nanomoe("explain", claim.job_id, "Era").out


def test_what_cannot_be_explained_is_one_line_and_exit_code_2(
    nanomoe: Run, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOMOE_URL", api.url)
    job = api.finished()
    write_tiny_checkpoint(tmp_path / "dense")
    for source in (f"{job}@100", "dense"):
        done = nanomoe("explain", source, "Era")
        assert (done.code, done.out) == (2, "")
        assert done.err == (f"nanomoe: {source} is dense, it has no experts: train one with --set use_moe=true\n")
    write_tiny_checkpoint(tmp_path / "mixture", use_moe=True)
    assert nanomoe("explain", "mixture", "").err == "nanomoe: mixture cannot be explained: the prompt has no token\n"
    (tmp_path / "empty").mkdir()
    missing = "nanomoe: empty holds no checkpoint: model.safetensors is missing\n"
    assert nanomoe("explain", "empty", "a").err == missing
