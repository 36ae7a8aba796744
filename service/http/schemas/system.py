"""The service itself: its workers, whether it lives, whether it can serve."""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict

from service.http.schemas.base import View


class Device(View):
    """What a worker trains on."""

    model_config = ConfigDict(extra="allow")

    device: str
    """Name of the device in torch: `cpu`, or `cuda:N`."""

    name: str | None = None
    """The maker's name of the device."""

    memory_bytes: int | None = None
    """The device's whole memory, in bytes."""


class WorkerView(View):
    """A worker, as it last reported itself."""

    id: str
    """Id of this start of the worker."""

    name: str
    """Name of the worker, the same at every start."""

    host: str
    """Name of the machine."""

    pid: int
    """Id of the worker's process."""

    devices: list[Device]
    """Devices that the worker trains on."""

    slots: int
    """Number of jobs that the worker trains at once."""

    versions: dict[str, str]
    """Versions of the code and its libraries."""

    current_jobs: list[str]
    """Ids of the jobs that the worker owns."""

    started_at: datetime
    """Time at which the worker started."""

    last_seen_at: datetime
    """Time of the worker's last sign of life."""

    stopped_at: datetime | None
    """Time at which the worker said that it stops; null while it runs, or if it never said so."""


class Health(View):
    """The answer to `GET /healthz`."""

    status: Literal["ok"] = "ok"
    """The process answers."""

    version: str
    """Version of the service."""


class Readiness(View):
    """The answer to `GET /readyz`."""

    status: Literal["ready"] = "ready"
    """Jobs can be submitted."""

    database: str
    """Kind of the database: `sqlite` or `postgresql`."""

    revision: str
    """Revision of the database's schema."""

    n_workers: int
    """Number of workers seen lately; none are needed to be ready."""
