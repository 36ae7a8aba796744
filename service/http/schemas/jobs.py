"""A job: the requests that submit and change it, its representation, and its status events."""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, Field, JsonValue, StringConstraints

from nanomoe.config import ConfigWarning, Integer, JobConfig, Strict
from service.http.patterns import PRINTABLE, PRINTABLE_OR_EMPTY, TAG_KEY
from service.http.schemas.base import Page, Text, View
from service.jobs.statuses import TERMINAL, Status

# Names and tags end up in terminals, tables and file names: no control characters.
JobName = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200, pattern=PRINTABLE)]
TagKey = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64, pattern=TAG_KEY)]
TagValue = Annotated[str, StringConstraints(strict=True, max_length=200, pattern=PRINTABLE_OR_EMPTY)]
Tags = Annotated[dict[TagKey, TagValue], Field(max_length=32, json_schema_extra={"additionalProperties": False})]


def split_tag(given: str) -> tuple[str, str | None]:
    """`key=value` or `key:value` -> the key and the value; the value of a lone `key` is None."""
    key, *value = re.split("[=:]", given, maxsplit=1)
    return key, value[0] if value else None


class SubmitRequest(Strict):
    """The body of `POST /jobs`."""

    text: Text = Field(min_length=1)
    """The training text: 2 tokens or more, at most the server's `max_text_bytes` in UTF-8. A byte-order mark at its
    start is dropped."""

    name: JobName | None = None
    """Name of the job, shown in lists."""

    tags: Tags = Field(default_factory=dict)
    """Labels of the job, by which lists can be filtered."""

    config: JobConfig = JobConfig()
    """Knobs that differ from the reference run."""

    priority: Integer = Field(0, ge=-100, le=100)
    """Priority of the job: a higher one is claimed sooner."""

    run_at: AwareDatetime | None = None
    """Time before which no worker claims the job; null is as soon as possible."""


class JobPatch(Strict):
    """The body of `PATCH /jobs/{id}`. Fields that are left out keep their values."""

    name: JobName | None = None
    """New name of the job; null removes the name."""

    tags: Tags = Field(default_factory=dict)
    """New tags of the job, which replace all previous ones."""


class Progress(View):
    """Progress of a job's training."""

    step: int = 0
    """Optimizer steps done."""

    total_steps: int | None = None
    """Optimizer steps planned; null until the text is tokenised."""

    epoch: float = 0
    """Passes over the text done."""

    percent: float = 0
    """Share of the steps that are done, 0 to 100; 100 once the job has succeeded, even if it stopped early."""

    tok_per_sec: float | None = None
    """Recent training speed, in tokens a second."""

    eta_seconds: float | None = None
    """Seconds of training left at that speed; 0 once the job has succeeded."""


class ModelSize(View):
    """Parameter counts of a job's model; null until the vocabulary is known."""

    n_params: int | None = None
    """All parameters, the tied output layer counted once."""

    n_active_params: int | None = None
    """Parameters that one token passes through."""


class TextInfo(View):
    """A training text, represented by its digest and length."""

    sha256: str
    """SHA-256 of the text's UTF-8 bytes, hexadecimal."""

    n_bytes: int
    """Length of the text in bytes of UTF-8."""

    n_tokens: int | None = None
    """Length of the text in tokens; null until it is tokenised."""


class JobError(View):
    """Why a job failed."""

    code: str
    """Stable, machine-readable name of the error."""

    message: str
    """Explanation of the error, with figures, for people."""


class Parent(View):
    """The checkpoint that a job started from."""

    job_id: str
    """Id of the job that recorded the checkpoint."""

    checkpoint: int
    """Percent of the checkpoint."""


class JobFigures(View):
    """Figures of the newest checkpoint of a job."""

    percent: int
    """Percent of the checkpoint: 100 for the last."""

    loss: float | None
    """Cross-entropy on the training text, in nats per token, dropout off."""

    perplexity: float | None
    """exp(`loss`); null where that is too large for a number."""


class Cohort(View):
    """Jobs of one shape that a worker claimed together, to be trained by one trainer."""

    id: str
    """Id of the cohort: 32 hexadecimal digits."""

    size: int
    """Number of the jobs that were claimed together."""


class JobView(View):
    """A training job: its config, status and progress."""

    id: str
    """Id of the job: 32 hexadecimal digits."""

    name: str | None
    """Name of the job, as submitted or changed; null for none."""

    tags: dict[str, str]
    """Tags of the job, as submitted or changed."""

    status: Status
    """Status of the job: queued, running or paused; succeeded, failed or cancelled at the end."""

    queue_position: int | None = None
    """Jobs that will be claimed before this one, up to 1,000; null unless queued, and in lists."""

    estimated_start_at: datetime | None = None
    """Estimated time at which a worker will be free for the job, by the recent speed of the running jobs; null in
    lists, and unless the job is queued."""

    created_at: datetime
    """Time at which the job was submitted."""

    started_at: datetime | None
    """Time at which a worker first claimed the job; null before."""

    finished_at: datetime | None
    """Time at which the job reached a terminal status; null before."""

    attempt: int
    """Number of times that a worker claimed the job."""

    status_reason: str | None
    """Why the job is paused or waiting, also where a quota of its owner is used up, or succeeded before its last step:
    `stopped early at step 42: perplexity 1.987`."""

    priority: int
    """Priority of the job: a higher one is claimed sooner."""

    run_at: datetime | None
    """Time before which no worker claims the job; null where none was asked for."""

    execution: dict[str, JsonValue] | None
    """Device, precision, threads and paths, fixed at the first start; `micro_batch` shrinks when memory runs out."""

    cohort: Cohort | None = None
    """The cohort in which the last attempt ran; null where it ran alone."""

    progress: Progress
    """Progress of the training."""

    config: JobConfig
    """Complete config of the job, defaults filled in."""

    model: ModelSize
    """Parameter counts of the model."""

    text: TextInfo
    """Digest and length of the training text."""

    warnings: list[ConfigWarning]
    """Warnings about the config, and about events of the training."""

    error: JobError | None
    """Why the job failed; null unless it did."""

    parent: Parent | None
    """The checkpoint whose weights the job started from; null for random weights."""

    sweep_id: str | None = None
    """Id of the sweep that the job was submitted with; null for a job of its own."""

    figures: JobFigures | None = None
    """Figures of the newest checkpoint; null before the first one, and in the answer to a change."""

    @property
    def is_terminal(self) -> bool:
        """Whether the status is terminal."""
        return self.status in TERMINAL


class JobPage(Page[JobView]):
    """One page of the jobs, newest first."""

    counts: dict[Status, int] | None = None
    """Number of the jobs with each status, whatever `status` and page were asked for; null unless asked for."""


class Estimate(View):
    """The response to a dry run: size, steps and warnings of the job. Null where only the start of training decides."""

    config: JobConfig
    """Complete config of the job, defaults filled in."""

    text: TextInfo
    """Digest and length of the training text."""

    model: ModelSize
    """Parameter counts that the model would have."""

    training_bytes: int | None
    """Bytes of memory at the peak of training on a CPU: weights, gradients, optimizer, activations and the bytes of a
    checkpoint. With less, training takes fewer windows together, or computes activations again."""

    flops_per_token: int | None
    """Floating-point operations of training on one token, counting only the experts that it is routed to."""

    steps_per_epoch: int | None
    """Optimizer steps of one pass over the text."""

    total_steps: int | None
    """Optimizer steps of the job."""

    quarters: dict[int, int]
    """Percent of each checkpoint -> the step after which it is recorded; empty until `total_steps` is known."""

    predicted_seconds: float | None = None
    """Seconds of training, by the speed of the jobs that succeeded last; null where nothing is known of it."""

    warnings: list[ConfigWarning]
    """Warnings about the config."""


class StatusEvent(View):
    """`event: status`: the job's status right after a change. `step` events are a `Progress`, `checkpoint` events a
    `CheckpointMetrics` without tokens, `warning` events a `ConfigWarning`."""

    status: Status
    """The job's new status."""

    status_reason: str | None = None
    """Why the job is paused or waiting, or succeeded before its last step."""

    attempt: int = 0
    """Number of times that a worker had claimed the job."""

    error: JobError | None = None
    """Why the job failed; null unless it did."""
