"""The messages between supervisor and trainer: one JSON object a line, over the trainer's stdin and stdout.

A trainer serves one job after another, or several together, so each of its messages about a job names the attempt.
Knows neither of the two processes, no torch and no database.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, field_serializer

from nanomoe.checkpoint import FileEntry
from nanomoe.config import ConfigWarning, JobConfig, Strict
from nanomoe.evaluation.metrics import CheckpointMetrics
from nanomoe.store.cache import CacheAddress

StopReason = Literal["cancel", "pause", "drain"]


class Folder(Strict):
    """A checkpoint or snapshot."""

    folder: str
    """Absolute path, or the URL of a folder in a bucket."""

    manifest_sha256: str
    """SHA-256 of the recorded manifest, which lists the SHA-256 of every file."""


class Assignment(NamedTuple):
    """An attempt at a job. The fence alone names none: the first attempts of two jobs have the same."""

    job_id: str
    fence: int


# -- To the trainer ---------------------------------------------------------------------------------------------------


class Start(Strict):
    """An attempt at a job: all that a trainer needs to begin."""

    job_id: str
    fence: int
    """Fence of the claim, which is a part of the name of every folder that this attempt writes."""

    config: JobConfig
    text_path: str
    """The training text, UTF-8."""

    folder: str
    """The job's folder, in which checkpoints and snapshots are written: its absolute path, or its URL in a bucket."""

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

    cache: CacheAddress | None = None
    """Where files of a bucket are kept that are read; null where the store is a folder."""

    @property
    def assignment(self) -> Assignment:
        """The attempt that begins with this message."""
        return Assignment(self.job_id, self.fence)


class Train(Strict):
    """Jobs for a trainer that has none: one, or the members of a cohort. The open file of the slot's lock is sent with
    it (`worker.lock`)."""

    type: Literal["train"] = "train"
    starts: list[Start] = Field(min_length=1)


class KeepAlive(Strict):
    """Sign of life of the supervisor, sent whether or not the database is within reach. The supervisor itself kills the
    trainer at the lease's deadline."""

    type: Literal["keep_alive"] = "keep_alive"
    until: float
    """Time of the machine's monotonic clock at which the trainer kills itself unless a later one has come: before
    another worker can claim its job."""


class Stop(Strict):
    """Request to stop one job at the next step boundary; before a pause or a drain a snapshot is written. Jobs that are
    trained together with it go on."""

    type: Literal["stop"] = "stop"
    assignment: Assignment
    reason: StopReason


# -- From the trainer -------------------------------------------------------------------------------------------------


class Ready(Strict):
    """A new trainer has imported torch, has touched no GPU, and waits for its first start message."""

    type: Literal["ready"] = "ready"
    cohort: int | None = None
    """Most jobs of one shape that this trainer should be given together, as it has measured; null where it was not
    asked to measure."""


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
    """A checkpoint is complete, and durable in the store."""

    type: Literal["checkpoint"] = "checkpoint"
    folder: str
    """Name of the folder inside of the job's folder."""

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
    """A snapshot is complete, and durable in the store."""

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
    """The final message about a job's training: the trainer has left it, and writes nothing of it any more. One that
    ends without it has crashed."""

    type: Literal["done"] = "done"
    outcome: Literal["succeeded", "stopped", "failed"]
    error: Failure | None = None


class Idle(Strict):
    """Nothing of its jobs is left in the trainer: their threads have ended, their memory is freed, its copy of the lock
    is closed. It waits for the next jobs. A trainer that cannot promise this exits instead."""

    type: Literal["idle"] = "idle"


ToTrainer = Train | KeepAlive | Stop
AboutJob = Prepared | Steps | CheckpointWritten | SnapshotWritten | Warned | Done
"""The messages about one of the trainer's jobs."""

FromTrainer = Ready | AboutJob | Idle


class Line(Strict):
    """A line from the trainer."""

    assignment: Assignment | None
    """The attempt that the message is about; null for `Ready` and `Idle`, which are about none."""

    message: FromTrainer = Field(discriminator="type")


_TO_TRAINER: TypeAdapter[ToTrainer] = TypeAdapter(Annotated[ToTrainer, Field(discriminator="type")])


def encode(message: ToTrainer) -> bytes:
    """The line that carries `message` to the trainer."""
    return message.model_dump_json().encode() + b"\n"


def encode_from_trainer(message: FromTrainer, assignment: Assignment | None = None) -> bytes:
    """The line that carries `message`, about this attempt or about none, to the supervisor."""
    return Line(assignment=assignment, message=message).model_dump_json().encode() + b"\n"


def parse_to_trainer(line: bytes) -> ToTrainer:
    """The message of a line. Raises ValueError when it is none."""
    return _TO_TRAINER.validate_json(line)


def parse_from_trainer(line: bytes) -> Line:
    """The message of a line, and the attempt that it is about. Raises ValueError when it is none."""
    return Line.model_validate_json(line)
