"""A trainer whose model is a hash, for deaths so many that torch would take most of the time to load.

`python toy_trainer.py DEATHS --parent PID --until TIME`, DEATHS being JSON, `{ATTEMPT: POINT}`: it is killed at that
point of the commit of a folder, for example `f1-50/renamed`. As in a real training, every file follows from all steps
before it, so that whoever loses, repeats or mixes up a step ends with other bytes.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanomoe import checkpoint
from nanomoe.checkpoint import CONFIG, METRICS, RESUME_STATE, RESUME_TENSORS, WEIGHTS
from nanomoe.evaluation.metrics import CheckpointMetrics
from nanomoe.processes import die_with_parent
from nanomoe.store import commit
from worker.protocol import (
    Assignment,
    CheckpointWritten,
    Done,
    FromTrainer,
    Prepared,
    Ready,
    SnapshotWritten,
    Start,
    Steps,
    encode_from_trainer,
)
from worker.supervision import Supervision

CHECKPOINT = frozenset({CONFIG, METRICS, WEIGHTS, "tokenizer.json", "tokenizer_config.json"})
SNAPSHOT = CHECKPOINT - {METRICS} | {RESUME_TENSORS, RESUME_STATE}
QUARTERS = {0: 0, 2: 25, 4: 50, 6: 75, 8: 100}
"""{step: percent}."""


@dataclass
class Toy:
    """What has been learnt."""

    step: int = 0
    weights: str = ""

    def learn(self) -> float:
        """One step; its loss."""
        self.step += 1
        self.weights = hashlib.sha256(f"{self.weights} {self.step}".encode()).hexdigest()
        return int(self.weights[:4], 16) / 2**12

    def files(self, names: frozenset[str]) -> dict[str, bytes]:
        """A folder's content, each file another one."""
        return {name: f"{self.step} {self.weights} {name}".encode() for name in names}

    @property
    def metrics(self) -> CheckpointMetrics:
        """Metrics that follow from all steps; `weights` is one that no version knows."""
        place = {"percent": QUARTERS[self.step], "step": self.step, "epoch": self.step}
        measured = {"loss": self.step, "perplexity": None, "bits_per_byte": 1.0, "accuracy": 0.0}
        return CheckpointMetrics.model_validate(place | measured | {"weights": self.weights})

    @classmethod
    def resumed(cls, files: dict[str, bytes]) -> "Toy":
        step, weights, _ = files[RESUME_STATE].decode().split(" ")
        return cls(int(step), weights)


assignment: Assignment | None = None
"""The attempt that messages are about."""


def send(message: FromTrainer) -> None:
    os.write(1, encode_from_trainer(message, assignment))


def train(start: Start) -> None:
    """The whole job, in the order of a real one: a quarter's steps, its checkpoint, its snapshot."""
    folder, toy = Path(start.folder), Toy()
    if start.resume is not None:
        toy = Toy.resumed(checkpoint.open(Path(start.resume.folder), start.resume.manifest_sha256).read_all())
    total = max(QUARTERS)
    send(
        Prepared(
            execution={"device": "cpu", "micro_batch": 1}, n_tokens=1, total_steps=total, n_params=1, n_active_params=1,
            resumed_at_step=toy.step if start.resume else None, warnings=[],
        )
    )  # fmt: skip
    if start.resume is None:
        commit_checkpoint(start, folder, toy)
    while toy.step < total:
        loss = toy.learn()
        figures = {"train_loss": [loss], "lr": [0.5], "grad_norm": [1.0]}
        send(Steps(step=[toy.step], tok_per_sec=1.0, epoch=toy.step, **figures))
        if toy.step in QUARTERS:
            commit_checkpoint(start, folder, toy)
            if toy.step < total:
                commit_snapshot(start, folder, toy)


def commit_checkpoint(start: Start, folder: Path, toy: Toy) -> None:
    name = checkpoint.folder_name(start.fence, QUARTERS[toy.step])
    manifest, sha256 = write(folder / name, toy.files(CHECKPOINT))
    send(
        CheckpointWritten(
            folder=name, manifest_sha256=sha256, files=manifest.files, metrics=toy.metrics, tok_per_sec=None,
        )
    )  # fmt: skip


def commit_snapshot(start: Start, folder: Path, toy: Toy) -> None:
    name = checkpoint.snapshot_name(start.fence, toy.step)
    _, sha256 = write(folder / name, toy.files(SNAPSHOT))
    send(SnapshotWritten(step=toy.step, folder=name, manifest_sha256=sha256))


def write(folder: Path, files: dict[str, bytes]) -> tuple[checkpoint.Manifest, str]:
    global writing
    writing = folder.name
    return checkpoint.write(folder, files)


writing = ""
"""The folder that is being committed."""


def dying_at(death: str | None) -> Callable[[str], None]:
    def reached(point: str) -> None:
        if death == f"{writing}/{point}":
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


if __name__ == "__main__":
    deaths: dict[str, str] = json.loads(sys.argv.pop(1))
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--until", type=float, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    supervision = Supervision(options.until)
    send(Ready())
    assigned = supervision.wait_for_jobs()
    assert assigned is not None
    (start,), _ = assigned
    assignment = start.assignment
    commit.reached = dying_at(deaths.get(str(start.fence)))
    train(start)
    send(Done(outcome="succeeded"))
