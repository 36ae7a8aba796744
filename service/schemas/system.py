"""The service itself: its workers, whether it lives, whether it can serve."""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict

from service.schemas.base import View


class Device(View):
    """What a worker trains on."""

    model_config = ConfigDict(extra="allow")

    device: str
    """`cpu`, or `cuda:N`."""

    name: str | None = None
    """The maker's name of it."""

    memory_bytes: int | None = None
    """All of its memory."""


class WorkerView(View):
    """A worker, as it last reported itself."""

    id: str
    """Of this start of the worker."""

    name: str
    """Stable across starts."""

    host: str
    """The machine's name."""

    pid: int
    """Its process there."""

    devices: list[Device]
    """What it trains on."""

    slots: int
    """Jobs that it trains at once."""

    versions: dict[str, str]
    """Of the code and its libraries."""

    current_jobs: list[str]
    """Ids of the jobs that it owns."""

    started_at: datetime
    """When it started."""

    last_seen_at: datetime
    """Its last sign of life."""

    stopped_at: datetime | None
    """When it said that it stops; null while it runs, or if it never said so."""


class Health(View):
    """The answer to `GET /healthz`."""

    status: Literal["ok"] = "ok"
    """The process answers."""

    version: str
    """Of the service."""


class Readiness(View):
    """The answer to `GET /readyz`."""

    status: Literal["ready"] = "ready"
    """Jobs can be submitted."""

    database: str
    """`sqlite` or `postgresql`."""

    revision: str
    """The schema's revision."""

    n_workers: int
    """Workers seen lately; none are needed to be ready."""
