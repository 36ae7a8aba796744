"""The trainer's own parts: the channel that nobody else can write to, the writer, and what an error means."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanomoe.config import InitFrom
from nanomoe.evaluation.metrics import CheckpointMetrics
from nanomoe.training.steps.kept import KeptSteps
from tests.service.tiny_checkpoint import write_tiny_checkpoint
from worker import trainer
from worker.channel import JobChannel
from worker.job_trainer import Writer, _explain, run_job
from worker.protocol import CheckpointWritten, Done, Folder, Idle, Ready, SnapshotWritten, Start, parse_from_trainer

ROOT = Path(__file__).parents[2]


class RecordingChannel(JobChannel):
    """A channel that ends here."""

    def __init__(self) -> None:
        self.messages: list[object] = []

    def send(self, message: object) -> None:
        self.messages.append(message)


def test_stray_prints_of_the_trainer_and_its_children_never_reach_the_supervisor() -> None:
    code = (
        "import os, sys; from worker.channel import Channel; from worker.protocol import Ready; channel = Channel(); "
        "print('stray', flush=True); os.write(1, b'stray'); os.system('echo stray'); channel.send(Ready())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert parse_from_trainer(said.stdout).message == Ready()
    assert said.stderr.count(b"stray") == 3


def recorded(percent: int) -> object:
    from nanomoe.training.loop import Recorded

    metrics = CheckpointMetrics(
        percent=percent, step=5, epoch=2, loss=1.0, perplexity=2.72, bits_per_byte=1.44, accuracy=0.5
    )
    return Recorded(metrics, 10.0, {"model.safetensors": b"weights"})


def test_folders_are_written_in_order_and_reported_once_complete(tmp_path: Path) -> None:
    from nanomoe.training.loop import Snapshot

    channel = RecordingChannel()
    writer = Writer(channel, tmp_path, fence=4)
    writer.write(recorded(25))  # type: ignore[arg-type]
    for _ in range(2):  # a stop right after a quarter asks for the same snapshot again
        writer.write(Snapshot(5, {"resume.json": b"{}"}))
    writer.close()
    checkpoint, snapshot = channel.messages
    assert isinstance(checkpoint, CheckpointWritten)
    assert (checkpoint.folder, checkpoint.metrics.percent) == ("f4-25", 25)
    assert (checkpoint.metrics.loss, checkpoint.tok_per_sec) == (1.0, 10.0)
    assert isinstance(snapshot, SnapshotWritten)
    assert snapshot.folder == "f4-s5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f4-25", "f4-s5"]


def test_a_disk_that_is_full_ends_the_training_and_not_the_writer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, files: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nanomoe.checkpoint.write", full)
    channel = RecordingChannel()
    writer = Writer(channel, tmp_path, fence=1)
    writer.write(recorded(0))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert channel.messages == []


@pytest.mark.parametrize(
    ("measured", "compiled_before", "n_jobs"),
    [(None, False, 2), (1, False, 1), (4, True, 2)],
    ids=["not measured", "measured without", "measured with"],
)
def test_a_trainer_that_measured_company_without_the_loops_ends_once_they_are_compiled(
    measured: int | None, compiled_before: bool, n_jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = compiled_before
    ended: list[Start] = []

    def train(start: Start, *_: object) -> Done:
        nonlocal compiled
        compiled = True
        ended.append(start)
        return Done(outcome="succeeded")

    clean = SimpleNamespace(restore=lambda: None, what_is_left=lambda: None)
    monkeypatch.setattr("worker.process_state.ProcessState", lambda _: clean)
    monkeypatch.setattr("nanomoe.training.steps.loops.compiling.LOOPS", SimpleNamespace(are_compiled=lambda: compiled))
    monkeypatch.setattr(trainer, "run_job", train)
    start = SimpleNamespace(assignment=None, execution=None)
    jobs = iter([([start], os.open(os.devnull, os.O_RDONLY)) for _ in range(2)])
    channel = RecordingChannel()
    supervision = SimpleNamespace(wait_for_jobs=lambda: next(jobs, None), should_exit=False)
    monkeypatch.setattr(trainer, "JobChannel", lambda *_: channel)
    trainer.train_jobs(channel, supervision, measured)  # type: ignore[arg-type]
    for _, lock in jobs:
        os.close(lock)
    assert len(ended) == n_jobs
    assert channel.messages[0] == Ready(cohort=measured)
    assert channel.messages.count(Idle()) == (n_jobs if n_jobs == 2 else 0)


def test_a_deterministic_error_fails_the_job_and_any_other_is_a_crash() -> None:
    import torch

    from nanomoe.tokenizer import TokenizerError
    from nanomoe.training.loop import LossNotFinite, OutOfMemory

    def code(error: Exception) -> str | None:
        failure = _explain(error)
        return failure and failure.code

    assert code(LossNotFinite("NaN at step 3")) == "loss_not_finite"
    assert code(OutOfMemory("not even one window")) == "out_of_memory"
    assert code(torch.OutOfMemoryError("CUDA out of memory")) == "out_of_memory"
    assert code(TokenizerError("tokenizer_not_found", "no such name")) == "tokenizer_not_found"
    assert code(OSError(errno.ENOSPC, "No space left on device")) == "disk_full"
    assert code(OSError(errno.EFBIG, "File too large")) == "disk_full"
    assert code(OSError(errno.EIO, "Input/output error")) == "storage_failed"  # the next attempt may find another disk
    assert code(RuntimeError("a bug")) is None


def test_an_error_of_another_library_fails_no_job_whatever_attributes_it_has() -> None:
    class FromElsewhere(Exception):
        code = "out_of_stock"

    assert _explain(FromElsewhere("not ours")) is None


def test_a_damaged_parent_fails_the_job_by_name_before_anything_is_trained(tmp_path: Path) -> None:
    parent = write_tiny_checkpoint(tmp_path / "f1-100")
    weights = parent.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (tmp_path / "text.txt").write_text("o rato roeu a roupa")
    init_from = InitFrom(job_id="ab" * 16, checkpoint=100)
    start = Start(
        job_id="cd" * 16,
        fence=1,
        config=parent.config.model_copy(update={"init_from": init_from}),
        text_path=str(tmp_path / "text.txt"),
        folder=str(tmp_path),
        execution=None,
        resume=None,
        parent=Folder(folder=str(parent.folder), manifest_sha256=parent.manifest_sha256),
        device="cpu",
        snapshot_seconds=60,
        allow_hub=False,
        tokenizer_dir=None,
    )
    channel = RecordingChannel()
    done = run_job(start, channel, SimpleNamespace(stop_of=lambda _: None), KeptSteps())  # type: ignore[arg-type]
    assert done.error is not None
    assert done.error.code == "parent_unusable"
    assert done.error.message.startswith(f"cannot start from {'ab' * 16}@100: f1-100/model.safetensors: ")
    assert channel.messages == []
