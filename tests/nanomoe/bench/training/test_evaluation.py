"""Evaluation's share is the share of a job that its steps alone do not take."""

import pytest
import torch

from nanomoe.bench.training import evaluation
from nanomoe.training.run import Run

CPU = torch.device("cpu")


def test_a_share_is_what_the_steps_leave_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    original_record, original_step = Run.record, Run.train_step
    monkeypatch.setattr(Run, "record", lambda self, *a, **k: (done.append("record"), original_record(self, *a, **k))[1])
    monkeypatch.setattr(Run, "train_step", lambda self: (done.append("step"), original_step(self))[1])
    measured = evaluation.measure(200, 8, CPU, turns=1)
    assert (measured.n_tokens, measured.n_steps) == (200, 8)
    assert measured.n_trained_tokens == 8 * 199
    assert measured.share == pytest.approx(1 - measured.steps_seconds / measured.job_seconds)
    assert done.count("record") == 5
    assert done.count("step") == 1 + 8 + 8
