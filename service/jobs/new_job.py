"""A job that is ready to be queued."""

from collections.abc import Mapping
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
    owner: str = ""
    priority: int = 0
    run_at: datetime | None = None
    """Time before which no worker claims the job; None is as soon as possible."""

    n_tokens: int | None = None
    total_steps: int | None = None
    n_params: int | None = None
    n_active_params: int | None = None
    training_bytes: int | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    parent_id: str | None = None
    parent_percent: int | None = None
    idempotency_key: str | None = None
    """The same key with the same request is the same job, however often it is sent."""
