"""A sweep: the request that submits one, its representation and its estimate."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import Field, JsonValue, WithJsonSchema, model_validator

from nanomoe.config import ConfigWarning, Integer, Strict
from service.http.schemas.base import SAME_AS, Text, View
from service.http.schemas.jobs import JobName, Tags
from service.jobs.statuses import TERMINAL, Status

MAX_JOBS = 1000
"""Most jobs of a sweep."""


Knobs = Annotated[dict[str, JsonValue], WithJsonSchema({"type": "object", SAME_AS: "JobConfig"})]
"""Some knobs of a `JobConfig`. Checked when the jobs are made: one may be valid only together with another that
varies."""


class SweepRequest(Strict):
    """The body of `POST /sweeps`: what the jobs have in common, and what varies between them."""

    text: Text | None = Field(None, min_length=1)
    """Training text of every job whose point has none of its own; may be left out when all points have one. A
    byte-order mark at its start is dropped."""

    name: JobName | None = None
    """Name of the sweep. Its jobs are named after it and what varies."""

    tags: Tags = Field(default_factory=dict)
    """Labels of the sweep and of its jobs, which get the tag `sweep` beside them, with the sweep's id."""

    config: Knobs = Field(default_factory=dict)
    """Knobs that differ from the reference run in every job."""

    grid: dict[str, list[JsonValue]] | None = None
    """Knob -> its values: there is a job for each combination of one value of each."""

    points: list[dict[str, JsonValue]] | None = None
    """Knobs of each job, in place of `grid`: any combinations; `text` is one of them."""

    seeds: Integer = Field(1, ge=1, le=MAX_JOBS)
    """Number of jobs for each combination, with the seeds `seed`, `seed` + 1, ..."""

    @model_validator(mode="after")
    def _one_way_to_vary(self) -> Self:
        if self.grid is not None and self.points is not None:
            raise ValueError("give grid or points, not both")
        if "sweep" in self.tags:
            raise ValueError("the tag sweep is set by the service, to the sweep's id")
        return self


class SweepParameter(View):
    """What varies between the jobs of a sweep."""

    name: str
    """Name of a knob; `seed`; or `text`, whose values are SHA-256 digests."""

    values: list[JsonValue]
    """Distinct values of the parameter, in the order given."""


class SweepProgress(View):
    """Progress of all jobs of a sweep together."""

    step: int
    """Optimizer steps done, by all jobs."""

    total_steps: int | None
    """Optimizer steps planned, by all jobs; null until every text is tokenised."""

    percent: float
    """Mean of the jobs' progress, 0 to 100; a job that has ended counts as done."""


class SweepView(View):
    """Jobs that were submitted together to be compared."""

    id: str
    """Id of the sweep: 32 hexadecimal digits."""

    name: str | None
    """Name of the sweep, as submitted; null for none."""

    tags: dict[str, str]
    """Tags of the sweep, as submitted."""

    status: Status
    """Status of the sweep, derived from those of its jobs: running once one has begun and until all have ended or are
    paused; then paused if one is, failed if one is, cancelled if one is, succeeded if all are."""

    counts: dict[Status, int]
    """Number of the jobs with each status."""

    created_at: datetime
    """Time at which the sweep was submitted."""

    config: dict[str, JsonValue]
    """Knobs that all jobs have in common, as submitted."""

    parameters: list[SweepParameter]
    """What varies between the jobs."""

    job_ids: list[str] | None = None
    """Ids of the jobs in the order of submission; null in lists."""

    progress: SweepProgress | None = None
    """Progress of all jobs together; null in lists."""

    eta_seconds: float | None = None
    """Seconds until all jobs have ended, at the speed of those that ran; null in lists, and where that would be a
    guess."""

    @property
    def is_terminal(self) -> bool:
        """Whether all jobs have ended."""
        return sum(self.counts.get(status, 0) for status in TERMINAL) == sum(self.counts.values())


class SweepShape(View):
    """Jobs of a sweep that have the same size, and whose tensors have."""

    n_jobs: int
    """Number of these jobs."""

    n_params: int | None
    """Parameters of the model; null until the vocabulary is known."""

    n_active_params: int | None
    """Parameters that one token passes through; null until the vocabulary is known."""

    training_bytes: int | None
    """Bytes of memory that one of the jobs needs."""

    total_steps: int | None
    """Optimizer steps of one of the jobs; null until the text is tokenised."""

    together: int | None
    """Most jobs of the sweep that one trainer would train together with one of these, itself included: 1 where each is
    trained alone; null where no worker is alive that has the memory."""


class SweepCohorts(View):
    """How many cohorts of one size a sweep has; a job that is trained alone counts as a cohort of one."""

    n_jobs: int
    """Number of jobs of each cohort."""

    n_cohorts: int
    """Number of cohorts."""


class SweepWarning(ConfigWarning):
    """A warning about some jobs of a sweep."""

    n_jobs: int
    """Number of jobs with exactly this warning."""


class SweepEstimate(View):
    """The response to a dry run: what the jobs of a sweep would need."""

    n_jobs: int
    """Number of jobs."""

    parameters: list[SweepParameter]
    """What varies between the jobs."""

    shapes: list[SweepShape]
    """The jobs by their sizes, the first submitted first. Tensors of different sizes may have the same number of
    parameters: such jobs are listed apart, because they are not trained together."""

    training_bytes: int | None
    """Bytes of memory that the largest of the jobs needs."""

    total_steps: int | None
    """Optimizer steps of all jobs; null until every text is tokenised."""

    cohorts: list[SweepCohorts] | None
    """Cohorts that the workers which are alive would claim if nothing else waited or ran, the largest first; null where
    for some job no worker is alive that has the memory."""

    predicted_seconds: float | None
    """Seconds from the first start to the last end, trained in these cohorts, by the speed of the jobs that succeeded
    last, alone or in cohorts of up to twice or half the size; null where nothing is known of it."""

    predicted_alone_seconds: float | None
    """Seconds from the first start to the last end if each job were trained alone; null where nothing is known of
    it."""

    warnings: list[SweepWarning]
    """Warnings about the jobs, each with the number of jobs that have it."""
