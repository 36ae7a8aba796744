"""The messages between supervisor and trainer: one JSON object a line, over the trainer's stdin and stdout.

Knows neither of them, no torch and no database.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from nanomoe.checkpoint import FileEntry
from nanomoe.config import ConfigWarning, JobConfig, Strict

StopReason = Literal["cancel", "pause", "drain"]


class Folder(Strict):
    """A checkpoint or snapshot on the disk."""

    folder: str
    """Absolute path."""

    manifest_sha256: str
    """SHA-256 of the recorded manifest, which lists the SHA-256 of every file."""


# -- To the trainer ---------------------------------------------------------------------------------------------------


class Start(Strict):
    """Start message: the one job that this process trains."""

    type: Literal["start"] = "start"
    job_id: str
    fence: int
    """Fence of the claim, which is a part of the name of every folder that this attempt writes."""

    config: JobConfig
    text_path: str
    """The training text, UTF-8."""

    folder: str
    """Absolute path of the job's folder, in which checkpoints and snapshots are written."""

    execution: dict[str, Any] | None
    """Execution that the job's first start decided, to be used again; null at the first start."""

    resume: Folder | None
    """The snapshot to go on from."""

    parent: Folder | None
    """The checkpoint whose weights the job starts from."""

    tokenizer: Folder | None = None
    """The checkpoint of an earlier attempt whose tokenizer the job goes on with, where it starts again at step 0."""

    device: str
    """Device in torch's notation, for example `cpu` or `cuda`."""

    snapshot_seconds: float
    """Seconds between rolling snapshots."""

    allow_hub: bool
    """Whether a tokenizer may be downloaded."""

    tokenizer_dir: str | None
    """Folder under which local tokenizers lie."""


class KeepAlive(Strict):
    """Sign of life of the supervisor, sent whether or not the database is within reach. The supervisor itself kills the
    trainer at the lease's deadline."""

    type: Literal["keep_alive"] = "keep_alive"
    until: float
    """Time of the machine's monotonic clock at which the trainer kills itself unless a later one has come: before
    another worker can claim its job."""


class Stop(Strict):
    """Request to stop at the next step boundary; before a pause or a drain a snapshot is written."""

    type: Literal["stop"] = "stop"
    reason: StopReason


# -- From the trainer -------------------------------------------------------------------------------------------------


class Ready(Strict):
    """The trainer has imported torch, has touched no GPU, and waits for the start message."""

    type: Literal["ready"] = "ready"


class Prepared(Strict):
    """The text is tokenised and the model is built; training begins."""

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
    """Number of each step, from 1."""

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
    percent: int
    step: int
    epoch: int
    folder: str
    """Name of the folder inside of the job's folder."""

    manifest_sha256: str
    files: list[FileEntry]
    metrics: dict[str, Any]


class SnapshotWritten(Strict):
    """A snapshot is complete and flushed to the disk."""

    type: Literal["snapshot"] = "snapshot"
    step: int
    folder: str
    """Name of the folder inside of the job's folder."""

    manifest_sha256: str


class Warned(Strict):
    """A warning for the user; training goes on."""

    type: Literal["warning"] = "warning"
    code: str
    message: str
    micro_batch: int | None = None
    """New size of the micro-batch, in windows, where the warning is about that."""


class Failure(Strict):
    """Why a job failed."""

    code: str
    """Stable, machine-readable name of the error."""

    message: str


class Done(Strict):
    """The final message. A trainer that ends without it has crashed."""

    type: Literal["done"] = "done"
    outcome: Literal["succeeded", "stopped", "failed"]
    error: Failure | None = None


ToTrainer = Start | KeepAlive | Stop
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
