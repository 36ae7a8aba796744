"""Names of a job and its checkpoint on the command line: `JOB`, `JOB@50`, `latest`, `latest@100`."""

from dataclasses import dataclass
from typing import Any, Self, cast

from nanomoe.config import PERCENTS, Percent
from service.cli.addresses import option_for
from service.cli.text import program
from service.cli.usage_error import UsageError
from service.client import Client, JobHandle
from service.client.calls import CheckpointSelector

LATEST = "latest"


@dataclass(frozen=True)
class Reference:
    """A job, and optionally one of its checkpoints."""

    job: str
    """A job's id, its name, a unique beginning of its id, or `latest` for the newest job."""

    checkpoint: CheckpointSelector | None
    """Percent or `latest`; None when none was named."""

    @classmethod
    def parse(cls, given: str) -> Self:
        """From `JOB` or `JOB@CHECKPOINT`; raises UsageError."""
        job, at, which = given.rpartition("@") if "@" in given else (given, "", "")
        if not job:
            raise UsageError(f"{given!r} names no job; it must look like JOB@50, or latest@50")
        if not at:
            return cls(job, None)
        percents = [str(percent) for percent in PERCENTS]
        if which == LATEST:
            return cls(job, "latest")
        if which.removesuffix("%") not in percents:
            raise UsageError(f"{given!r} names no checkpoint; after @ comes {', '.join(percents)} or {LATEST}")
        return cls(job, cast(Percent, int(which.removesuffix("%"))))

    def find(self, client: Client) -> JobHandle:
        """The job; raises `NotFound`, or UsageError for `latest` when there is no job."""
        if "/" in self.job:
            return client.job(_id_of_name(client, self.job))
        if self.job != LATEST:
            return client.job(self.job)
        newest = client.list_jobs(limit=1).data
        if not newest:
            at = option_for(client.base_url)
            raise UsageError(f"there is no job yet; submit one: {program()} submit FILE{at}")
        return client.job(newest[0].id)  # a list has no queue positions

    def id_or_name(self, client: Client) -> str:
        """The job as the service takes it: as given, or the id of the newest. Raises as `find`."""
        return self.find(client).id if self.job == LATEST else self.job

    def init_from(self) -> dict[str, Any]:
        """The reference as the knob `init_from`, whose default checkpoint is the last."""
        percent = {} if self.checkpoint is None else {"checkpoint": self.checkpoint}
        return {"job_id": self.job, **percent}

    def __str__(self) -> str:
        return self.job if self.checkpoint is None else f"{self.job}@{self.checkpoint}"


def _id_of_name(client: Client, name: str) -> str:
    """The id of the one job of a name that cannot stand in a path; raises UsageError."""
    found = [job.id for job in client.list_jobs(name=name, limit=2).data]
    if len(found) != 1:
        raise UsageError(f"{'several jobs have' if found else 'no job has'} the name {name!r}")
    return found[0]


def sweep_id_or_name(client: Client, given: str) -> str:
    """A sweep as the service takes it: as given, or the id of the newest for `latest`. Raises UsageError where there
    is none."""
    if given != LATEST:
        return given
    newest = client.list_sweeps(limit=1).data
    if not newest:
        raise UsageError(f"there is no sweep yet; submit one: {program()} sweep FILE --grid lr=1e-4,5e-3")
    return newest[0].id
