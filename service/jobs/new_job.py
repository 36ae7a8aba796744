"""A job, and a sweep of jobs, that are ready to be queued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to insert as a row: what was submitted, checked, and what was computed from it."""

    text: str
    config: Mapping[str, Any]
    """The complete JobConfig, as JSON."""

    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    run_at: datetime | None = None
    """Time before which no worker claims the job; None is as soon as possible."""

    n_tokens: int | None = None
    total_steps: int | None = None
    n_params: int | None = None
    n_active_params: int | None = None
    training_bytes: int | None = None
    cohort_key: str | None = None
    """Shape of the job, by which it may be trained together with others; None for one that is trained alone."""

    warnings: list[dict[str, Any]] = field(default_factory=list)
    parent_id: str | None = None
    parent_percent: int | None = None
    idempotency_key: str | None = None
    """The same key with the same request is the same job, however often it is sent."""


@dataclass(frozen=True, kw_only=True)
class NewSweep:
    """Jobs to insert together, and the row of the sweep that they form."""

    jobs: Sequence[NewJob]
    """One or more; none has an idempotency key of its own."""

    config: Mapping[str, Any]
    """The knobs that the jobs have in common, as submitted."""

    parameters: Sequence[Mapping[str, Any]]
    """What varies: `{"name", "values"}` each."""

    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
