"""The messages between supervisor and trainer."""

import pytest

from nanomoe.checkpoint import FileEntry
from nanomoe.config import ConfigWarning, JobConfig
from nanomoe.evaluation.metrics import CheckpointMetrics
from worker.protocol import (
    Assignment,
    CheckpointWritten,
    Done,
    Failure,
    Folder,
    FromTrainer,
    Idle,
    KeepAlive,
    Prepared,
    Ready,
    SnapshotWritten,
    Start,
    Steps,
    Stop,
    ToTrainer,
    Train,
    Warned,
    encode,
    encode_from_trainer,
    parse_from_trainer,
    parse_to_trainer,
)

TO_TRAINER: list[ToTrainer] = [
    Train(
        starts=[
            Start(
                job_id="0" * 32,
                fence=3,
                config=JobConfig(betas=(0.8, 0.9)),
                text_path="/data/jobs/0/text.txt",
                folder="/data/jobs/0",
                execution={"device": "cpu"},
                resume=Folder(folder="/data/jobs/0/f2-s7", manifest_sha256="a" * 64),
                parent=None,
                device="cpu",
                snapshot_seconds=60.0,
                allow_hub=False,
                tokenizer_dir=None,
            ),
        ]
    ),
    KeepAlive(until=12.5),
    Stop(assignment=Assignment("0" * 32, 3), reason="pause"),
]
FROM_TRAINER: list[FromTrainer] = [
    Ready(),
    Prepared(
        execution={"device": "cpu"},
        n_tokens=87,
        total_steps=500,
        n_params=10,
        n_active_params=5,
        resumed_at_step=None,
        warnings=[ConfigWarning(code="router_starved", message="k = 1")],
    ),
    Steps(step=[1, 2], train_loss=[9.0, 8.9], lr=[1e-4, 1e-4], grad_norm=[1.9, 1.8], tok_per_sec=3900.0, epoch=2),
    CheckpointWritten(
        folder="f1-25",
        manifest_sha256="b" * 64,
        files=[FileEntry(name="model.safetensors", size=1, sha256="c" * 64)],
        metrics=CheckpointMetrics(
            percent=25, step=125, epoch=125, loss=5.1, perplexity=164.0, bits_per_byte=7.36, accuracy=0.1, moe=None
        ),
        tok_per_sec=3900.0,
    ),
    SnapshotWritten(step=125, folder="f1-s125", manifest_sha256="d" * 64),
    Warned(code="dead_expert", message="expert 3 of layer 1"),
    Warned(code="micro_batch_halved", message="4 windows did not fit", micro_batch=2),
    Done(outcome="failed", error=Failure(code="loss_not_finite", message="at step 3")),
    Idle(),
]


@pytest.mark.parametrize("message", TO_TRAINER, ids=lambda message: message.type)
def test_a_message_to_the_trainer_is_one_line_and_parses_unchanged(message: ToTrainer) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert parse_to_trainer(line) == message


@pytest.mark.parametrize("message", FROM_TRAINER, ids=lambda message: message.type)
def test_a_message_of_the_trainer_is_one_line_and_parses_unchanged(message: FromTrainer) -> None:
    assignment = None if isinstance(message, (Ready, Idle)) else Assignment("0" * 32, 3)
    line = encode_from_trainer(message, assignment)
    assert line.count(b"\n") == 1
    parsed = parse_from_trainer(line)
    assert (parsed.message, parsed.assignment) == (message, assignment)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"loading weights...",
        b"{}",
        b'{"type":"ready"}',
        b'{"assignment":null,"message":{"type":"keep_alive","until":1.0}}',
        b'{"assignment":null,"message":{"type":"ready","x":1}}',
        b'{"assignment":["a"],"message":{"type":"ready"}}',
    ],
)
def test_any_other_line_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="validation error"):
        parse_from_trainer(line)


def test_a_figure_that_is_not_finite_is_refused() -> None:
    steps = b'{"type":"steps","step":[1],"train_loss":[NaN],"lr":[1],"grad_norm":[1],"tok_per_sec":1,"epoch":1}'
    with pytest.raises(ValueError, match="finite"):
        parse_from_trainer(b'{"assignment":["a",1],"message":' + steps + b"}")
