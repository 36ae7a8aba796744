"""The reference run itself, as a job does it on a CPU: no config, the bundled paragraph, 500 epochs."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nanomoe import checkpoint
from nanomoe.config import JobConfig
from nanomoe.export import export_hf
from nanomoe.tokenizer import load_tokenizer
from nanomoe.training.loop import train
from nanomoe.training.run import Recorded, prepare


def test_the_text_is_learnt_by_heart_and_transformers_finds_the_same_losses(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (files("nanomoe.assets") / "paragraph.pt.txt").read_text(encoding="utf-8")
    config = JobConfig()
    tokenizer = load_tokenizer(config.tokenizer)
    tokens = tokenizer.encode(text)
    run = prepare(config, text, tokenizer, path="fused").run
    quarters = [happened for happened in train(run) if isinstance(happened, Recorded)]
    assert [(quarter.percent, quarter.metrics.step) for quarter in quarters] == [
        (0, 0),
        (25, 125),
        (50, 250),
        (75, 375),
        (100, 500),
    ]

    for quarter in quarters:
        checkpoint.write(tmp_path / f"f1-{quarter.percent}", quarter.files)
        export_hf(checkpoint.open(tmp_path / f"f1-{quarter.percent}", None), tmp_path / "hf")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = F.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:]).item()
        assert quarter.metrics.loss == pytest.approx(loss, rel=1e-4), quarter.percent

    first, last = quarters[0].metrics, quarters[-1].metrics
    assert first.loss == pytest.approx(first.baselines.uniform, abs=0.1)
    assert last.perplexity < 2
    assert last.accuracy == 1.0
    assert last.continuation.prompt == tokenizer.decode(tokens[:10])
    assert last.continuation.text == tokenizer.decode(tokens[10:35])
    assert last.reconstruction.text == tokenizer.decode(tokens[1:])
