"""`nanomoe score` and `nanomoe inspect` against a real server."""

from pathlib import Path

import pytest

from service import queue
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
    assert "nothing of it stands in the training text" in strange.out
    assert nanomoe("score", job_id, "-", "--url", api.url, stdin=b"a").err.startswith("nanomoe: text_too_short")


def test_a_prompt_is_inspected(nanomoe: Run, api: Api, job_id: str) -> None:
    shown = nanomoe("inspect", job_id, "Era", "--url", api.url)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    (of_attention,) = (n for n, line in enumerate(lines) if "'a' attends to" in line)
    (of_router,) = (n for n, line in enumerate(lines) if "experts of 'a'" in line)
    assert of_attention == 11, "ten next tokens below their heading"
    assert of_router - of_attention == 5, "two layers of two heads"
    assert [line.split()[0] for line in lines[of_router + 1 :]] == ["1"]
    assert len(nanomoe("inspect", job_id, "Era", "--url", api.url, "--json").json["likeliest"]) == 10
