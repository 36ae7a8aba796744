"""The plain script trains what the reference job trains."""

import json

import pytest

from nanomoe.bench import models, plain_script
from nanomoe.config import JobConfig
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.loop import Recorded, train
from nanomoe.training.run import prepare


def test_the_script_ends_about_where_the_job_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plain_script", "--steps", "6"])
    plain_script.main()
    config = JobConfig(max_steps=6)
    run = prepare(config, models.paragraph(), load_tokenizer(config.tokenizer)).run
    last = [happened for happened in train(run) if isinstance(happened, Recorded)][-1]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last.metrics.loss, rel=0.01)
