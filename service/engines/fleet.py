"""A fleet of workers as it was asked for, what an engine reports of it, and the interface of an engine.

An engine (Ray, Slurm) places, restarts and scales workers, which claim jobs from the database for hours; it never sees
a job.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from service.settings import SQLITE, Settings

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")

WorkerState = Literal["pending", "starting", "running", "pausing", "draining", "ended", "refused"]
"""pending: the engine has no place for it yet; pausing: it crashed, and is started again after a pause; ended: it
stopped by itself or was drained; refused: settings or machine forbid its start, and it is not tried again."""


@dataclass(frozen=True)
class Fleet:
    """What was asked for: workers of one kind that share a database."""

    name: str
    least: int
    """Workers that run whether there are jobs or not."""

    most: int
    """Workers that run when enough jobs wait; those above `least` end once they have been idle."""

    cpus: int = 2
    """CPUs of a worker, and threads of all of its trainers together."""

    gpus: int = 0
    slots: int = 1
    """Trainers on each GPU of a worker, or on its CPUs."""

    idle_seconds: int = 300
    """Seconds without a job after which a worker above `least` ends."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables of its workers. May hold a password: never shown."""

    @property
    def jobs_per_worker(self) -> int:
        """Trainers that a worker runs side by side."""
        return self.slots * max(1, self.gpus)

    def worker_name(self, index: int) -> str:
        """The stable name of a worker, as `GET /workers` shows it."""
        return f"{self.name}-{index}"

    def worker_arguments(self, index: int) -> list[str]:
        """The options of `python -m worker`."""
        arguments = ["--name", self.worker_name(index), "--slots", str(self.slots)]
        return arguments if index < self.least else [*arguments, "--idle-seconds", str(self.idle_seconds)]

    def worker_environment(self, index: int) -> dict[str, str]:
        """Variables of one worker: the fleet's, its devices, and its threads.

        Each worker has CPU devices of its own name: two of one host and data folder must not share a slot's lock.
        """
        device = ",".join(f"cuda:{n}" for n in range(self.gpus)) or f"cpu:{index}"
        threads = max(1, self.cpus // self.jobs_per_worker)
        return {**self.environment, "NANOMOE_DEVICE": device, "OMP_NUM_THREADS": str(threads)}

    def fingerprint(self, index: int) -> str:
        """The same for two fleets of the same name exactly if this worker of theirs is the same."""
        worker = [self.cpus, self.gpus, self.worker_arguments(index), sorted(self.worker_environment(index).items())]
        return hashlib.sha256(json.dumps(worker).encode()).hexdigest()


@dataclass(frozen=True)
class PlacedWorker:
    """What an engine reports of one worker."""

    name: str
    state: WorkerState
    host: str | None = None
    pid: int | None = None
    restarts: int = 0
    """How often its place was lost, and how often it crashed where it is now."""

    reason: str | None = None
    """Why it is pending, pausing or refused."""

    engine_id: str | None = None
    """What the engine calls it, where that is not its name: its job in Slurm."""


@dataclass(frozen=True)
class FleetStatus:
    """A fleet at one moment."""

    name: str
    fleet: Fleet | None
    """What was asked for; None where the engine does not know: nobody keeps up the number of its workers."""

    workers: Sequence[PlacedWorker]
    problem: str | None = None
    """What keeps the fleet from following the queue."""

    def view(self) -> dict[str, Any]:
        """The status as JSON, without the environment."""
        asked = {} if self.fleet is None else vars(self.fleet) | {}
        asked.pop("environment", None)
        return {
            "name": self.name,
            **{key: value for key, value in asked.items() if key != "name"},
            "workers": [vars(worker) for worker in self.workers],
            "problem": self.problem,
        }


class EngineError(Exception):
    """An engine cannot do what was asked; the text says why, and how to correct it."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Engine(Protocol):
    """What the command line needs of an engine. Each method raises EngineError."""

    def up(self, fleet: Fleet) -> FleetStatus:
        """Bring the fleet to what is asked for. Idempotent: asked for the same again, nothing happens."""

    def status(self, name: str) -> FleetStatus:
        """The fleet now. Raises EngineError `no_such_fleet`."""

    def down(self, name: str, *, now: bool) -> Sequence[PlacedWorker]:
        """Drain the workers, wait until they have ended, and remove them; returns those that there were. Jobs return to
        the queue, with a snapshot unless `now`."""


def environment_of(settings: Settings, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables with which a process on any host has these settings, wherever it runs.

    `inherited`: the environment of this process, of which the credentials of a bucket are taken.
    """
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    given["data_dir"] = settings.data_dir  # made absolute
    if settings.database_url.startswith(SQLITE):
        given["database_url"] = settings.database_url
    variables = {name: value for name, value in inherited.items() if name.startswith("AWS_")}
    for name, value in given.items():
        if value is not None:
            shown = ",".join(value) if isinstance(value, tuple) else str(value)
            variables[f"NANOMOE_{name.upper()}"] = shown
    return variables
