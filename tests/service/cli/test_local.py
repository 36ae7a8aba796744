"""The commands that compute on this machine."""

import json
import re
import signal
from pathlib import Path

import pytest

from nanomoe import checkpoint
from nanomoe.tokenizer import load_tokenizer
from service.cli.knobs import config_of
from service.jobs.submission import assess
from service.settings import Settings
from tests.api import TEXT
from tests.nanomoe.sample_tokenizers import other_meaning
from tests.service.cli.conftest import Run
from tests.service.tiny_checkpoint import write_tiny_checkpoint

TINY = [
    part
    for setting in ("tokenizer=bytes", "n_layer=1", "n_head=1", "n_embd=8", "block_size=32", "dropout=0", "epochs=8")
    for part in ("--set", setting)
]


def test_train_shows_the_quarters_and_writes_complete_checkpoints(nanomoe: Run, tmp_path: Path) -> None:
    done = nanomoe("train", "-", *TINY, "--out", "run", stdin=TEXT.encode())
    assert (done.code, done.err) == (0, "")
    assert [int(n) for n in re.findall(r"^ +(\d+) %", done.out, re.M)] == [0, 25, 50, 75, 100]
    assert done.out.endswith("checkpoints are in run\n")
    for percent in (0, 25, 50, 75, 100):
        assert checkpoint.open(tmp_path / "run" / str(percent), None).metrics().percent == percent
    assert checkpoint.open(tmp_path / "run" / "100", None).config().epochs == 8

    exported = nanomoe("export", "run/100", "hf")
    assert (exported.code, exported.out, exported.err) == (0, "wrote hf\n", "")
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_train_for_programs_is_a_line_of_json_for_each_event(nanomoe: Run) -> None:
    done = nanomoe("train", "-", *TINY, "--json", "--set", "cont_prefix_tokens=100", stdin=TEXT.encode())
    events = [json.loads(line) for line in done.out.splitlines()]
    assert {event["event"] for event in events} == {"warning", "step", "checkpoint"}
    assert events[-1]["data"]["percent"] == 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "-", "--set", f"init_from={'0' * 32}"], "init_from names a job of a service"),
        (["train", "-", "--out", "."], ". exists already"),
        (["train", "-", "--set", "val_fraction=0.9", "--set", "tokenizer=bytes"], "text_too_short: "),
        (["train", "-", "--set", "tokenizer=nobody/nothing"], "hub_not_allowed: "),
        (["export", "latest", "."], ". exists already"),
        (["export", "empty", "new"], "empty holds no checkpoint: model.safetensors is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_impossible_run_is_one_line_and_exit_code_2(
    nanomoe: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = nanomoe(*arguments, stdin=b"abc")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"nanomoe: {said}")
    assert done.err.count("\n") == 1


def test_an_unknown_format_is_exit_code_2(nanomoe: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert nanomoe("export", "empty", "new", "--to", "cake").code == 2
    assert not (tmp_path / "new").exists()


def test_a_run_that_diverges_is_exit_code_1_with_the_step(nanomoe: Run) -> None:
    done = nanomoe(
        "train", "-", *TINY, "--set", "lr=10", "--set", "weight_decay=10", "--set", "eps=1e-30", stdin=b"ab" * 99
    )
    assert done.code == 1
    assert re.match(r"nanomoe: loss_not_finite: at step \d+ ", done.err)


def test_ctrl_c_prints_the_progress_and_leaves_complete_checkpoints(
    nanomoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoint.write

    def interrupt_after_writing(folder: Path, files: dict[str, bytes]) -> object:
        result = written(folder, files)
        if folder.name == "25":
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(checkpoint, "write", interrupt_after_writing)
    done = nanomoe("train", "-", *TINY, "--out", "run", stdin=TEXT.encode())
    assert done.code == 130
    n_steps = checkpoint.open(tmp_path / "run" / "25", None).metrics().step
    assert done.err == f"stopped at step {n_steps}; its checkpoints are in run\n"


def test_a_checkpoint_of_an_earlier_bundle_is_explained_and_exported_with_its_own_tokenizer(
    nanomoe: Run, tmp_path: Path
) -> None:
    earlier = other_meaning(load_tokenizer("ptbr-8k"))
    made = write_tiny_checkpoint(tmp_path / "earlier", tokenizer=earlier, use_moe=True)
    token = earlier.encode("Era uma vez")[-1]
    answer = nanomoe("explain", "earlier", "Era uma vez", "--json").json
    assert (answer["token_id"], answer["token"]) == (token, earlier.decode([token]))
    assert nanomoe("export", "earlier", "hf").code == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_text("utf-8") == earlier.definition
    assert made.tokenizer == earlier


def test_train_warns_of_what_a_job_warns_of(nanomoe: Run) -> None:
    traps = ("min_lr=1e-5", "n_experts=4", "warmup_steps=1000", "tokenizer=ptbr-8k")
    settings = [part for trap in traps for part in ("--set", trap)]
    text = "Жил-был царь, и была у него мантия. " * 2
    done = nanomoe("train", "-", *TINY, *settings, "--json", stdin=text.encode())
    events = [json.loads(line) for line in done.out.splitlines()]
    codes = {event["data"]["code"] for event in events if event["event"] == "warning"}
    assert codes >= {"settings_unused", "moe_settings_unused", "warmup_beyond_end", "tokenizer_far_from_text"}
    found = assess(text, config_of(None, [*TINY[1::2], *traps]), Settings(_env_file=None), None)
    assert codes == {warning.code for warning in found.warnings}
