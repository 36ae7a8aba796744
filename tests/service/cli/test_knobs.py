"""Knobs on the command line: everything from the classes."""

import json
from pathlib import Path

import pytest

from nanomoe.config import InitFrom, JobConfig
from service.cli.knobs import complete_knob, config_of, knob_rows
from service.cli.usage_error import UsageError

JOB_ID = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr=1e-3", 0.001),
        ("lr=.5", 0.5),
        ("epochs=7", 7),
        ("epochs=7.0", 7),
        ("epochs=1e2", 100),
        ("use_moe=true", True),
        ("max_steps=null", None),
        ("betas=[0.8, 0.9]", (0.8, 0.9)),
        ("lr_schedule=cosine", "cosine"),
        ("tokenizer=train:300", "train:300"),
        ("tokenizer=true", "true"),
        ('tokenizer="bytes"', "bytes"),
        (f"init_from={JOB_ID}@50", InitFrom(job_id=JOB_ID, checkpoint=50)),
        (f"init_from={JOB_ID}", InitFrom(job_id=JOB_ID, checkpoint=100)),
        (f'init_from={{"job_id": "{JOB_ID}"}}', InitFrom(job_id=JOB_ID)),
    ],
)
def test_a_value_is_json_or_a_word(setting: str, value: object) -> None:
    config = config_of(None, [setting, "min_lr=0"])
    assert getattr(config, setting.partition("=")[0]) == value


def test_a_set_option_overrides_the_file_and_a_later_one_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"epochs": 1, "seed": 5}')
    config = config_of(file, ["epochs=2", "epochs=3"])
    assert (config.epochs, config.seed) == (3, 5)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"epochs": 3}', "utf-8-sig")
    assert config_of(file, []).epochs == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "must hold an object"),
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ('{"epohcs": 1}', "did you mean 'epochs'?"),
    ],
)
def test_a_file_that_is_no_config_is_a_usage_error(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        config_of(file, [])


def test_every_knob_is_listed_with_its_default_its_bounds_and_its_meaning() -> None:
    rows = {row.name: row for row in knob_rows()}
    assert set(rows) == set(JobConfig.model_fields)
    assert all(row.meaning and row.bounds and row.part for row in rows.values())
    assert json.loads(rows["betas"].default) == [0.9, 0.95]
    assert rows["lr"].bounds == "above 0 to 10"
    assert rows["seed"].bounds == "0 to 9,223,372,036,854,775,807"
    assert rows["dropout"].bounds == "0 to below 1"
    assert rows["lr_schedule"].bounds == "constant or cosine"
    assert rows["top_k"].bounds == "1 to 1,000,000 or null"
    assert rows["init_from"].bounds == "JOB@PERCENT or null"


def test_the_shell_completes_a_knob_with_its_meaning() -> None:
    assert complete_knob("lr_s") == [("lr_schedule=", "What the learning rate does after warm-up.")]
    assert len(complete_knob("")) == len(JobConfig.model_fields)
