"""A comparison of jobs: what differs, the figures of each quarter, groups over seeds, and the curves of all."""

from pydantic import Field, JsonValue

from nanomoe.evaluation.metrics import MixtureFigures
from service.http.schemas.base import View
from service.http.schemas.checkpoints import CheckpointFigures
from service.http.schemas.sweeps import SweepParameter
from service.jobs.statuses import Status

_NOT_COMPARED = ("percent", "step", "epoch", "created_at", "baselines", "stopped_early", "best")

METRICS: tuple[str, ...] = (
    *(name for name in CheckpointFigures.model_fields if name not in _NOT_COMPARED),
    *(f"moe.{name}" for name in MixtureFigures.model_fields),
)
"""Metrics that jobs are compared by: the numbers of a checkpoint, and the means of its routers."""

DEFAULT_METRICS = ("loss", "perplexity", "bits_per_byte", "val_loss", "accuracy", "tok_per_sec")


class ComparedQuarter(View):
    """A recorded checkpoint of a job."""

    percent: int
    """Percent of the checkpoint."""

    step: int
    """Optimizer steps before the checkpoint."""

    metrics: dict[str, float | None]
    """The metrics that were asked for; null for one that the checkpoint does not have."""


class StepFigures(View):
    """The step series of a job at one step."""

    train_loss: float | None
    """Loss of the step's batch, with dropout on, in nats per token."""

    lr: float | None
    """Learning rate of the step."""

    grad_norm: float | None
    """Norm of the step's whole gradient, before clipping."""


class StepsUntil(View):
    """When a job first recorded a checkpoint at or below a perplexity."""

    step: int
    """Optimizer steps before that checkpoint."""

    after_step: int
    """Optimizer steps before the checkpoint before it: the perplexity was reached between the two."""

    seconds: float
    """Seconds from the first claim of the job to the recording of the checkpoint, pauses included."""


class ComparedJob(View):
    """A job in a comparison, as far as it has come."""

    job_id: str
    """Id of the job."""

    name: str | None
    """Name of the job; null for none."""

    status: Status
    """Status of the job."""

    values: dict[str, JsonValue]
    """Values of the parameters that differ."""

    quarters: list[ComparedQuarter]
    """Recorded checkpoints of the job by percent; empty for a job that has not recorded any."""

    steps_until: StepsUntil | None = None
    """When the job came to `perplexity`; null where it has not, or none was asked for."""

    at_step: StepFigures | None = None
    """Step series of the job at the step in `at`; null where it has not done that step, or none was asked for."""


class Spread(View):
    """A figure over several jobs."""

    n: int
    """Number of jobs that have the figure."""

    mean: float
    """Mean of the figure."""

    std: float | None
    """Sample standard deviation of the figure, with n - 1 in the denominator; null for a single job."""

    min: float
    """Smallest value of the figure."""

    max: float
    """Largest value of the figure."""


class GroupQuarter(View):
    """One percent of the jobs of a group."""

    percent: int
    """Percent of the checkpoints."""

    metrics: dict[str, Spread | None]
    """Spread of each metric over the jobs that have recorded this percent; null where none has the metric."""


class ComparedGroup(View):
    """Jobs that differ only in their seed."""

    values: dict[str, JsonValue]
    """Values of the parameters that differ, without the seed."""

    job_ids: list[str]
    """Ids of the jobs in the group."""

    quarters: list[GroupQuarter]
    """Spread of the figures by percent."""

    steps_until: Spread | None = None
    """Spread of the steps until `perplexity`, over the jobs that came to it."""

    seconds_until: Spread | None = None
    """Spread of the seconds until `perplexity`, over the jobs that came to it."""

    at_step: dict[str, Spread | None] | None = None
    """Spread of the step series at the step in `at`."""


class BestFigure(View):
    """The best value of a metric among all jobs and checkpoints."""

    metric: str
    """Name of the metric."""

    job_id: str
    """Id of the job; of several with the same value, the first submitted."""

    percent: int
    """Percent of the checkpoint."""

    value: float
    """Value of the metric."""


class Comparison(View):
    """Jobs side by side."""

    parameters: list[SweepParameter]
    """What differs between the jobs, with its distinct values: knobs, and `text` with SHA-256 digests."""

    metrics: list[str]
    """Names of the metrics that are compared."""

    larger_is_better: list[str] = Field(default_factory=list)
    """Metrics of the comparison whose largest value is the best; of the others it is the smallest."""

    jobs: list[ComparedJob]
    """The jobs in the order of submission."""

    groups: list[ComparedGroup]
    """The jobs by all that differs but the seed."""

    best: BestFigure | None
    """The best value of the first metric, or of `best`; null while no checkpoint has it."""


class JobEnvelope(View):
    """The training loss of a job in buckets of equal length."""

    job_id: str
    """Id of the job."""

    bucket_steps: int
    """Steps of a bucket, a power of two: bucket b holds the steps b * bucket_steps + 1 to (b + 1) * bucket_steps."""

    last_step: int
    """The last step of the series; 0 for a job without one."""

    low: list[float | None]
    """Smallest `train_loss` of each bucket, with five significant digits; null in a bucket without a finite one."""

    high: list[float | None]
    """Largest `train_loss` of each bucket, with five significant digits; null in a bucket without a finite one."""


class ComparedSeries(View):
    """The curves of the training loss of many jobs."""

    jobs: list[JobEnvelope]
    """The jobs in the order of submission."""
