"""The service itself: workers, liveness and readiness."""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict

from service.http.schemas.base import View


class Device(View):
    """A device that a worker trains on."""

    model_config = ConfigDict(extra="allow")

    device: str
    """Name of the device in torch: `cpu`, or `cuda:N`."""

    name: str | None = None
    """Model name of the device, by its maker."""

    memory_bytes: int | None = None
    """Total memory of the device, in bytes."""

    cohort: int | None = None
    """Most jobs of one shape that a trainer on the device trains together; null of a worker that does not say."""


class WorkerView(View):
    """A worker, as it last reported itself."""

    id: str
    """Id of this run of the worker."""

    name: str
    """Name of the worker, the same at every start."""

    host: str
    """Name of the machine."""

    pid: int
    """Id of the worker's process."""

    devices: list[Device]
    """Devices that the worker trains on."""

    slots: int
    """Number of jobs, or cohorts of jobs, that the worker trains at once."""

    busy_slots: int
    """Number of slots that train: the jobs of a cohort have one."""

    versions: dict[str, str]
    """Versions of the code and its libraries."""

    current_jobs: list[str]
    """Ids of the jobs that the worker owns."""

    started_at: datetime
    """Time at which the worker started."""

    last_seen_at: datetime
    """Time of the worker's last heartbeat."""

    stopped_at: datetime | None
    """Time at which the worker shut down; null while it runs, and if it was killed."""


class Health(View):
    """The answer to `GET /healthz`."""

    status: Literal["ok"] = "ok"
    """The process is alive."""

    version: str
    """Version of the service."""


class Readiness(View):
    """The answer to `GET /readyz`."""

    status: Literal["ready"] = "ready"
    """Constant: jobs can be submitted."""

    database: str
    """Kind of the database: `sqlite` or `postgresql`."""

    revision: str
    """Revision of the database's schema."""

    n_workers: int
    """Number of workers with a recent heartbeat; none are needed to be ready."""
