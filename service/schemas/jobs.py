"""A job: how it is submitted and changed, how it looks, and how its status is told."""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, Field, JsonValue, StringConstraints

from nanomoe.config import ConfigWarning, JobConfig, Strict
from service.patterns import PRINTABLE, PRINTABLE_OR_EMPTY, TAG_KEY
from service.schemas.base import TERMINAL, Status, Text, View

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
    """What to call the job."""

    tags: Tags = Field(default_factory=dict)
    """Labels to find the job by."""

    config: JobConfig = JobConfig()
    """What to change of the reference run."""

    priority: int = Field(0, ge=-100, le=100)
    """Higher is claimed sooner."""

    run_at: AwareDatetime | None = None
    """Not to be claimed before this time; null is now."""


class JobPatch(Strict):
    """The body of `PATCH /jobs/{id}`. What is left out stays as it is."""

    name: JobName | None = None
    """The new name; null takes the name away."""

    tags: Tags = Field(default_factory=dict)
    """The new tags, instead of all the old ones."""


class Progress(View):
    """How far a job has come."""

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
    """Parameters of a job's model; null until the vocabulary is known."""

    n_params: int | None = None
    """All of them, the tied output layer counted once."""

    n_active_params: int | None = None
    """Those that one token passes through."""


class TextInfo(View):
    """The training text, without the text."""

    sha256: str
    """Of its UTF-8 bytes."""

    n_bytes: int
    """UTF-8 bytes."""

    n_tokens: int | None = None
    """Tokens; null until it is tokenised."""


class JobError(View):
    """Why a job failed."""

    code: str
    """Stable and machine-readable."""

    message: str
    """For a person, with the figures."""


class Parent(View):
    """The checkpoint that a job started from."""

    job_id: str
    """The job that recorded it."""

    checkpoint: int
    """Its percent."""


class JobView(View):
    """A job."""

    id: str
    """32 hexadecimal digits, sortable by time."""

    name: str | None
    """As submitted or patched."""

    tags: dict[str, str]
    """As submitted or patched."""

    status: Status
    """queued, running or paused; succeeded, failed or cancelled at the end."""

    queue_position: int | None = None
    """Jobs that will be claimed before this one, up to 1,000; null unless queued, and in lists."""

    estimated_start_at: datetime | None = None
    """When a worker will be free for it, by the recent speed of the running jobs; null unless queued and among the next
    to be claimed, where that is not known, and in lists."""

    created_at: datetime
    """When it was submitted."""

    started_at: datetime | None
    """When a worker first claimed it."""

    finished_at: datetime | None
    """When it reached its last status."""

    attempt: int
    """Times a worker claimed it."""

    status_reason: str | None
    """Why it is paused or waiting, or succeeded before its last step: `stopped early at step 42: perplexity 1.987`."""

    priority: int
    """Higher is claimed sooner."""

    run_at: datetime
    """Not to be claimed before this time."""

    execution: dict[str, JsonValue] | None
    """Device, precision, threads and paths, fixed at the first start; `micro_batch` shrinks when memory runs out."""

    progress: Progress
    """How far it has come."""

    config: JobConfig
    """Complete, defaults filled in."""

    model: ModelSize
    """How large the model is."""

    text: TextInfo
    """What it is trained on."""

    warnings: list[ConfigWarning]
    """Legal traps of the config, and what happened on the way."""

    error: JobError | None
    """Why it failed; null unless it did."""

    parent: Parent | None
    """The checkpoint that it started from; null for random weights."""

    @property
    def is_terminal(self) -> bool:
        """Whether the status is the last one."""
        return self.status in TERMINAL


class Estimate(View):
    """The answer to a dry run: what the job would be. Null stands for what is known only once training starts."""

    config: JobConfig
    """Complete, defaults filled in."""

    text: TextInfo
    """What it would be trained on."""

    model: ModelSize
    """How large the model would be."""

    training_bytes: int | None
    """Memory for weights, gradients, optimizer and activations."""

    flops_per_token: int | None
    """Floating-point operations of training on one token, of the experts only those that it goes to."""

    steps_per_epoch: int | None
    """Optimizer steps of one pass over the text."""

    total_steps: int | None
    """Optimizer steps in all."""

    quarters: dict[int, int]
    """Percent of each checkpoint -> the step after which it is recorded; empty until `total_steps` is known."""

    warnings: list[ConfigWarning]
    """Legal traps of the config."""


class StatusEvent(View):
    """`event: status`: how the job stood right after it changed. `step` events are a `Progress`, `checkpoint` events a
    `CheckpointMetrics` without tokens, `warning` events a `ConfigWarning`."""

    status: Status
    """The new status."""

    status_reason: str | None = None
    """Why it is paused or waiting, or succeeded before its last step."""

    attempt: int = 0
    """Times a worker had claimed it."""

    error: JobError | None = None
    """Why it failed; null unless it did."""
