"""What a job measured: each checkpoint's figures and files, and the step series."""

from datetime import datetime

from pydantic import ConfigDict, Field

from nanomoe.evaluation import metrics as measured
from nanomoe.evaluation.metrics import (
    Baselines,
    CardToken,
    Continuation,
    MixtureFigures,
    MixtureLayer,
    MixtureMetrics,
    ReconstructedToken,
    Reconstruction,
)
from service.http.schemas.base import View
from service.jobs.statuses import Status

__all__ = [
    "Baselines",
    "CardToken",
    "CheckpointFigures",
    "CheckpointMetrics",
    "CheckpointView",
    "Continuation",
    "FileView",
    "Metrics",
    "MixtureFigures",
    "MixtureLayer",
    "MixtureMetrics",
    "ReconstructedToken",
    "Reconstruction",
    "ReconstructionPage",
    "StepSeries",
]


class ReconstructionPage(View):
    """A stretch of a reconstruction."""

    job_id: str
    """Id of the job."""

    percent: int
    """Percent of the checkpoint."""

    start: int = Field(alias="from", serialization_alias="from")
    """Index of the first target on this page."""

    n_tokens: int
    """Number of targets that are recorded."""

    truncated: bool
    """Whether the text has more targets than were recorded."""

    data: list[ReconstructedToken]
    """Targets on this page, with the predictions."""

    next_from: int | None
    """Value of `from` that asks for the next page; null at the end."""

    model_config = ConfigDict(populate_by_name=True)


class CreatedAt(measured.Position):
    """The place of a checkpoint in its training, and in time."""

    created_at: datetime
    """Time at which the checkpoint was recorded."""


class Speed(measured.Losses, CreatedAt):
    """How well a checkpoint predicts the training text, and how fast it was trained."""

    tok_per_sec: float | None = None
    """Training speed since the checkpoint before, in tokens a second; null at percent 0."""


# The order of the bases is that of the fields in JSON: pydantic takes those of the last base first. What knows a clock
# stands between the metrics there.
class CheckpointFigures(measured.CheckpointFigures, Speed):
    """A checkpoint's numbers, measured on the training text with dropout off."""

    best: bool | None = None
    """Whether the checkpoint is the first of the job's with the lowest `val_loss`; null without a `val_loss`, and in
    events."""


class CheckpointMetrics(CheckpointFigures, measured.CheckpointMetrics):
    """Everything that was measured at a checkpoint."""


class StepSeries(View):
    """Training steps, column by column; thinned, its minima and maxima are kept."""

    step: list[int]
    """Number of each optimizer step, from 1."""

    train_loss: list[float | None]
    """Loss of each step's batch, with dropout on, in nats per token."""

    lr: list[float | None]
    """Learning rate of each step."""

    grad_norm: list[float | None]
    """Norm of each step's whole gradient, before clipping."""


class Metrics(View):
    """The answer to `GET /jobs/{id}/metrics`."""

    job_id: str
    """Id of the job."""

    status: Status
    """Status of the job."""

    checkpoints: list[CheckpointMetrics]
    """The recorded checkpoints by percent; the first is the model before training."""

    steps: StepSeries
    """The step series, thinned to at most `points` steps."""


class FileView(View):
    """A file of a checkpoint."""

    name: str
    """Name of the file, as in `/checkpoints/{percent}/files/{name}`."""

    size: int
    """Size of the file in bytes."""

    sha256: str
    """SHA-256 of the file, hexadecimal."""


class CheckpointView(CheckpointFigures):
    """A recorded checkpoint: its numbers and its files."""

    files: list[FileView]
    """The files that can be downloaded."""
