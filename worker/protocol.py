"""What supervisor and trainer say to each other: one JSON object a line, over the trainer's stdin and stdout.

Knows neither of them, no torch and no database.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_serializer

from nanomoe.checkpoint import FileEntry
from nanomoe.config import ConfigWarning, JobConfig, Strict
from nanomoe.evaluation.metrics import CheckpointMetrics

StopReason = Literal["cancel", "pause", "drain"]


class Folder(Strict):
    """A checkpoint or snapshot on the disk."""

    folder: str
    """Absolute path."""

    manifest_sha256: str
    """SHA-256 of the recorded manifest, which vouches for every byte."""


# -- To the trainer ---------------------------------------------------------------------------------------------------


class Start(Strict):
    """The one job of this process."""

    type: Literal["start"] = "start"
    job_id: str
    fence: int
    """Names the folders that this attempt writes."""

    config: JobConfig
    text_path: str
    """The training text, UTF-8."""

    folder: str
    """Absolute path of the job's folder, in which checkpoints and snapshots are written."""

    execution: dict[str, Any] | None
    """That of the job's first start, to be used again; null at the first start."""

    resume: Folder | None
    """The snapshot to go on from."""

    parent: Folder | None
    """The checkpoint whose weights the job starts from."""

    tokenizer: Folder | None = None
    """The checkpoint of an earlier attempt whose tokenizer the job goes on with, where it starts again at step 0."""

    device: str
    """For example `cpu` or `cuda:0`."""

    snapshot_seconds: float
    """Time between rolling snapshots."""

    allow_hub: bool
    """Whether a tokenizer may be downloaded."""

    tokenizer_dir: str | None
    """Folder under which local tokenizers lie."""


class Beat(Strict):
    """The supervisor lives, whatever the database does; it ends the trainer itself when the lease is no longer
    certain."""

    type: Literal["beat"] = "beat"
    until: float
    """The trainer ends itself at this time of the machine's monotonic clock unless it hears of a later one: before
    anybody else can claim its job."""


class Stop(Strict):
    """End at the next step boundary; a pause or a drain leaves a snapshot."""

    type: Literal["stop"] = "stop"
    reason: StopReason


# -- From the trainer -------------------------------------------------------------------------------------------------


class Ready(Strict):
    """torch is imported, no device is touched: waiting for a start."""

    type: Literal["ready"] = "ready"


class Prepared(Strict):
    """The text is tokenised, the model is built; training begins."""

    type: Literal["prepared"] = "prepared"
    execution: dict[str, Any]
    n_tokens: int
    total_steps: int
    n_params: int
    n_active_params: int
    resumed_at_step: int | None
    """The step that training goes on from; null when it begins at 0."""

    warnings: list[ConfigWarning]


class Steps(Strict):
    """The figures of consecutive optimizer steps, column by column."""

    type: Literal["steps"] = "steps"
    step: list[int] = Field(min_length=1)
    """From 1."""

    train_loss: list[float]
    lr: list[float]
    grad_norm: list[float]
    tok_per_sec: float
    epoch: int
    """Epoch of the last step."""

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The step series, as the job table takes it."""
        return {"step": self.step, "train_loss": self.train_loss, "lr": self.lr, "grad_norm": self.grad_norm}


class CheckpointWritten(Strict):
    """A checkpoint is complete and flushed to the disk."""

    type: Literal["checkpoint"] = "checkpoint"
    folder: str
    """Name of the checkpoint's folder in the job's folder."""

    manifest_sha256: str
    """SHA-256 of the checkpoint's manifest, hexadecimal."""

    files: list[FileEntry]
    """Files of the checkpoint."""

    metrics: CheckpointMetrics
    """The checkpoint's metrics, with its place in the training."""

    tok_per_sec: float | None
    """Training speed since the checkpoint before, in tokens a second; null at percent 0."""

    @field_serializer("metrics")
    def _only_what_was_set(self, metrics: CheckpointMetrics) -> dict[str, Any]:
        # A field that was not measured stays out of the row, as it stays out of `metrics.json`.
        return metrics.model_dump(exclude_unset=True)


class SnapshotWritten(Strict):
    """A snapshot is whole and flushed to the disk."""

    type: Literal["snapshot"] = "snapshot"
    step: int
    folder: str
    """Its name in the job's folder."""

    manifest_sha256: str


class Warned(Strict):
    """Something that the user should know, while training goes on."""

    type: Literal["warning"] = "warning"
    code: str
    message: str
    micro_batch: int | None = None
    """Windows computed together from here on, where that is the warning."""


class Failure(Strict):
    """Why a job failed."""

    code: str
    """Stable and machine-readable."""

    message: str


class Done(Strict):
    """The last line. A trainer that ends without it has crashed."""

    type: Literal["done"] = "done"
    outcome: Literal["succeeded", "stopped", "failed"]
    error: Failure | None = None


ToTrainer = Start | Beat | Stop
FromTrainer = Ready | Prepared | Steps | CheckpointWritten | SnapshotWritten | Warned | Done

_TO_TRAINER: TypeAdapter[ToTrainer] = TypeAdapter(Annotated[ToTrainer, Field(discriminator="type")])
_FROM_TRAINER: TypeAdapter[FromTrainer] = TypeAdapter(Annotated[FromTrainer, Field(discriminator="type")])


def encode(message: ToTrainer | FromTrainer) -> bytes:
    """The line that carries `message`."""
    return message.model_dump_json().encode() + b"\n"


def parse_to_trainer(line: bytes) -> ToTrainer:
    """The message of a line; a ValueError when it is none."""
    return _TO_TRAINER.validate_json(line)


def parse_from_trainer(line: bytes) -> FromTrainer:
    """The message of a line; a ValueError when it is none."""
    return _FROM_TRAINER.validate_json(line)
