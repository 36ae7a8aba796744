"""`nanomoe import` against a real server."""

from pathlib import Path

from tests.api import TEXT, Api
from tests.nanomoe.foreign_models import gpt2, save_gpt2
from tests.service.cli.conftest import Run


def test_a_folder_becomes_a_finished_job(nanomoe: Run, api: Api, tmp_path: Path) -> None:
    save_gpt2(tmp_path / "model", gpt2())
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    command = ("import", "model", "--text", "text.txt", "--name", "theirs", "--block-size", "8", "--url", api.url)
    shown = nanomoe(*command)
    assert shown.code == 0, shown.err
    assert "theirs" in shown.out
    assert "succeeded" in shown.out
    (job,) = api.http.get("/jobs").json()["data"]
    assert (job["config"]["block_size"], job["text"]["n_bytes"]) == (8, len(TEXT.encode()))


def test_what_is_no_model_is_a_usage_error(nanomoe: Run, api: Api, tmp_path: Path) -> None:
    for path in ("missing.pt", str(tmp_path)):
        shown = nanomoe("import", path, "--url", api.url)
        assert (shown.code, "is no model" in shown.err) == (2, True), shown.err
