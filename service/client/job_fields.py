"""What a job's handle knows without asking: the fields of the job as last seen, under their own names."""

from datetime import datetime

from pydantic import JsonValue

from nanomoe.config import ConfigWarning, JobConfig
from service.http import schemas


class JobFields:
    """The fields of `JobView` as properties. All but `text`: on a handle that asks for the training text."""

    view: schemas.JobView
    """The job as last seen; `refresh` looks again."""

    @property
    def id(self) -> str:
        """32 hexadecimal digits."""
        return self.view.id

    @property
    def name(self) -> str | None:
        """What the job is called."""
        return self.view.name

    @property
    def tags(self) -> dict[str, str]:
        """Labels to find the job by."""
        return self.view.tags

    @property
    def status(self) -> schemas.Status:
        """queued, running or paused; succeeded, failed or cancelled at the end."""
        return self.view.status

    @property
    def status_reason(self) -> str | None:
        """Why the job is paused or waiting."""
        return self.view.status_reason

    @property
    def is_terminal(self) -> bool:
        """Whether the status is the last one."""
        return self.view.is_terminal

    @property
    def queue_position(self) -> int | None:
        """Jobs that will be claimed before this one; None unless queued, and of a job from a list."""
        return self.view.queue_position

    @property
    def estimated_start_at(self) -> datetime | None:
        """When a worker will be free for the job; None where that is not known."""
        return self.view.estimated_start_at

    @property
    def created_at(self) -> datetime:
        """When the job was submitted."""
        return self.view.created_at

    @property
    def started_at(self) -> datetime | None:
        """When a worker first claimed the job."""
        return self.view.started_at

    @property
    def finished_at(self) -> datetime | None:
        """When the job reached its last status."""
        return self.view.finished_at

    @property
    def attempt(self) -> int:
        """Times that a worker has claimed the job."""
        return self.view.attempt

    @property
    def priority(self) -> int:
        """-100 to 100; higher is claimed sooner."""
        return self.view.priority

    @property
    def run_at(self) -> datetime | None:
        """The time before which it is not to be claimed; None where none was asked for."""
        return self.view.run_at

    @property
    def execution(self) -> dict[str, JsonValue] | None:
        """Device, precision, threads and paths, fixed at the first start."""
        return self.view.execution

    @property
    def progress(self) -> schemas.Progress:
        """How far the training has come."""
        return self.view.progress

    @property
    def config(self) -> JobConfig:
        """The config, complete, defaults filled in."""
        return self.view.config

    @property
    def model(self) -> schemas.ModelSize:
        """How large the model is."""
        return self.view.model

    @property
    def warnings(self) -> list[ConfigWarning]:
        """Legal traps of the config, and what happened on the way."""
        return self.view.warnings

    @property
    def error(self) -> schemas.JobError | None:
        """Why the job failed; None unless it did."""
        return self.view.error

    @property
    def parent(self) -> schemas.Parent | None:
        """The checkpoint that the job started from; None for random weights."""
        return self.view.parent
