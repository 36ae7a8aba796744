"""The events of a stream of many jobs: those of a job's own stream, each with the id of its job."""

from nanomoe.config import ConfigWarning
from service.http.schemas.checkpoints import CheckpointFigures
from service.http.schemas.jobs import Progress, StatusEvent


class JobStatusEvent(StatusEvent):
    """`event: status` in a stream of many jobs: a job's status right after a change."""

    job_id: str
    """Id of the job."""


class JobStepEvent(Progress):
    """`event: step` in a stream of many jobs: how far a running job is."""

    job_id: str
    """Id of the job."""


class JobCheckpointEvent(CheckpointFigures):
    """`event: checkpoint` in a stream of many jobs: the figures of a checkpoint that a job has recorded."""

    job_id: str
    """Id of the job."""


class JobWarningEvent(ConfigWarning):
    """`event: warning` in a stream of many jobs: a warning about a job's config, or about an event of its training."""

    job_id: str
    """Id of the job."""
