"""Workers on a Slurm cluster: an array job, each task of which keeps one worker running as its child.

A task that is preempted or near its time limit is put back into Slurm's queue once its worker is drained. Nothing
follows the queue of jobs: a worker without a job ends, and gives its allocation back; `up` submits what is missing
again. What was submitted is remembered in a folder, so that any shell can ask for it.
"""

import fcntl
import json
import os
import pickle
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

from service.engines.fleet import EngineError, Fleet, FleetStatus, PlacedWorker, WorkerState
from service.engines.pilot import DRAIN_SECONDS, WORKER
from service.engines.slurm_task import AT_ONCE, DRAIN, WorkerTask
from service.settings import SQLITE

DEFAULT_MINUTES = 240
"""Time limit of a task, after which it is queued again."""

LEAST_MINUTES = 10
"""Shortest time limit: the signal before it comes up to a minute earlier than asked for."""

SIGNAL_SECONDS = 150
"""Time from Slurm's signal to the time limit: what a pilot may take to drain, and some for the requeue."""

_OURS = frozenset(
    {"array", "cpus-per-task", "error", "gpus", "gpus-per-node", "job-name", "nodes", "no-requeue", "ntasks"}
    | {"ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "wait", "wrap"}
)
"""Options of sbatch that follow from the fleet."""

_OPTION = re.compile(r"([a-z][a-z-]*)(?:=([^\n]+))?")

_WORKER_STATES: dict[str, WorkerState] = {"RUNNING": "running", "CONFIGURING": "starting", "COMPLETING": "draining"}
"""State of a worker by the state of its task; a task in any other one waits."""


@dataclass(frozen=True)
class _Task:
    """A task that was submitted."""

    index: int
    job: str
    """Slurm's id of it, for example `17_0`."""

    fingerprint: str
    is_ending: bool = False
    """Whether it was told to end, since the fleet has changed."""


@dataclass(frozen=True)
class _Queued:
    """What squeue says of a task that has not ended."""

    state: str
    host: str
    restarts: int
    reason: str


@dataclass(frozen=True)
class _Record:
    """What is remembered of a fleet."""

    fleet: Fleet
    """Without its environment."""

    tasks: Sequence[_Task]


class SlurmEngine:
    """The fleets that a data folder knows of."""

    def __init__(self, data_dir: Path, options: Sequence[str] = (), *, command: Sequence[str] = WORKER) -> None:
        """`options`: `KEY=VALUE` or `KEY` of sbatch each. `command` starts a worker. The hosts of the cluster must see
        the data folder, in the same place.

        Raises EngineError `slurm_not_found`, `slurm_option_invalid`.
        """
        self._minutes, self._options = _parsed(options)
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise EngineError("slurm_not_found", "sbatch is not on PATH: run this on a host of the Slurm cluster")
        self._folder = data_dir / "engines" / "slurm"
        self._command = command

    def up(self, fleet: Fleet) -> FleetStatus:
        """See `Engine.up`: workers that have ended are submitted again, and those that differ are drained and replaced.

        Raises EngineError `database_not_shared`, `slurm_refused`, `slurm_unreachable`.
        """
        hosts = set(_run("sinfo", "--noheader", "--Node", "--format=%N").split())
        if len(hosts) > 1 and fleet.environment.get("NANOMOE_DATABASE_URL", SQLITE).startswith(SQLITE):
            raise EngineError(
                "database_not_shared",
                f"the cluster has {len(hosts)} hosts, and SQLite serves one: workers of several need PostgreSQL "
                "(NANOMOE_DATABASE_URL), and a bucket (NANOMOE_STORE) or a data folder that all see",
            )
        with self._locked(fleet.name):
            record = self._read(fleet.name)
            queue = _queue()
            wanted = {n: f"{fleet.fingerprint(n)} {self._minutes} {self._options}" for n in range(fleet.most)}
            kept = []
            for task in record.tasks if record else ():
                if (queued := queue.get(task.job)) is None:
                    continue
                if wanted.get(task.index) != task.fingerprint:
                    task = replace(task, is_ending=True)
                    _end(task.job, queued, now=False)
                kept.append(task)
            missing = sorted(wanted.keys() - {task.index for task in kept if not task.is_ending})
            # Before the new ones: what is remembered must not lack a task that runs.
            self._write(_Record(fleet, kept))
            if missing:
                jobs = self._submit(fleet, missing)
                kept += [_Task(n, job, wanted[n]) for n, job in zip(missing, jobs, strict=True)]
                self._write(_Record(fleet, kept))
        return self.status(fleet.name)

    def status(self, name: str) -> FleetStatus:
        """See `Engine.status`. Raises EngineError `slurm_unreachable` too."""
        record = self._known(name)
        queue = _queue()
        workers = [self._placed(record.fleet, task, queue.get(task.job)) for task in record.tasks]
        return FleetStatus(name, record.fleet, sorted(workers, key=lambda worker: worker.name))

    def down(self, name: str, *, now: bool) -> Sequence[PlacedWorker]:
        """See `Engine.down`. Raises EngineError `workers_not_ended` for those that outlive the time of a drain."""
        with self._locked(name):
            ended = self.status(name).workers
            tasks = self._known(name).tasks
            give_up = time.monotonic() + DRAIN_SECONDS + 60
            while left := {
                task.job: queued for queue in [_queue()] for task in tasks if (queued := queue.get(task.job))
            }:
                if time.monotonic() > give_up:
                    raise EngineError("workers_not_ended", f"{', '.join(left)} have not ended: see squeue, scancel")
                for job, queued in left.items():
                    _end(job, queued, now=now)  # again: a signal does not reach a task that is just being started
                time.sleep(1)
            shutil.rmtree(self._folder / name)
        return ended

    def _submit(self, fleet: Fleet, indices: Sequence[int]) -> list[str]:
        """Slurm's ids of new tasks for these workers."""
        executor = SlurmExecutor(self._folder / fleet.name, max_num_timeout=1_000_000)
        executor.update_parameters(
            job_name=f"nanomoe-{fleet.name}",
            time=self._minutes,
            cpus_per_task=fleet.cpus,
            gpus_per_node=fleet.gpus or None,
            signal_delay_s=SIGNAL_SECONDS,
            stderr_to_stdout=True,
            array_parallelism=len(indices),
            wckey=None,
            # srun does not take it over from sbatch (Slurm 22.05 and newer).
            srun_args=[f"--cpus-per-task={fleet.cpus}"],
            additional_parameters={"requeue": True, **self._options},
        )
        try:
            jobs = executor.submit_array([WorkerTask(fleet, index, self._command) for index in indices])
        except (FailedJobError, FailedSubmissionError) as error:
            raise EngineError("slurm_refused", _last_line(str(error))) from None
        return [job.job_id for job in jobs]

    def _placed(self, fleet: Fleet, task: _Task, queued: _Queued | None) -> PlacedWorker:
        name = fleet.worker_name(task.index)
        if queued is None:
            return self._ended(name, task)
        state: WorkerState = "draining" if task.is_ending else _WORKER_STATES.get(queued.state, "pending")
        reason = f"Slurm: {queued.reason}" if state == "pending" else None
        return PlacedWorker(
            name, state, host=queued.host or None, restarts=queued.restarts, reason=reason, engine_id=task.job
        )

    def _ended(self, name: str, task: _Task) -> PlacedWorker:
        """What a task that has ended has left: its report, or a log."""
        paths = JobPaths(self._folder / _fleet_of(name), task.job, 0)
        try:
            _, report = pickle.loads(paths.result_pickle.read_bytes())  # noqa: S301 - a file of ours
        except FileNotFoundError:
            return PlacedWorker(name, "ended", reason=f"Slurm has ended it; see {paths.stdout}", engine_id=task.job)
        if isinstance(report, PlacedWorker):
            return replace(report, engine_id=task.job)
        return PlacedWorker(name, "ended", reason=_last_line(report), engine_id=task.job)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Within it no other process changes the fleet."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _known(self, name: str) -> _Record:
        record = self._read(name)
        if record is None:
            raise EngineError("no_such_fleet", f"there is no fleet {name} in {self._folder}")
        return record

    def _read(self, name: str) -> _Record | None:
        try:
            found = json.loads((self._folder / name / "fleet.json").read_bytes())
        except FileNotFoundError:
            return None
        return _Record(Fleet(**found["fleet"]), [_Task(**task) for task in found["tasks"]])

    def _write(self, record: _Record) -> None:
        folder = self._folder / record.fleet.name
        # Not for others: the environment of the workers lies in it, with what they reach database and bucket by.
        folder.mkdir(mode=0o700, exist_ok=True)
        fleet = asdict(replace(record.fleet, environment={}))
        unfinished = folder / "fleet.json.new"
        unfinished.write_text(json.dumps({"fleet": fleet, "tasks": [asdict(task) for task in record.tasks]}), "utf-8")
        unfinished.replace(folder / "fleet.json")


def _parsed(options: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """The time limit in minutes, and the other options of sbatch; those without a value are True."""
    minutes = DEFAULT_MINUTES
    found: dict[str, Any] = {}
    for option in options:
        matched = _OPTION.fullmatch(option.removeprefix("--"))
        if matched is None:
            raise EngineError("slurm_option_invalid", f"{option!r} is not KEY=VALUE, as in partition=gpu")
        key, value = matched.groups()
        if key in _OURS:
            raise EngineError("slurm_option_invalid", f"{key!r} follows from --count, --cpus, --gpus and --name")
        if key != "time":
            found[key] = True if value is None else value
        elif value is not None and value.isdecimal() and int(value) >= LEAST_MINUTES:
            minutes = int(value)
        else:
            raise EngineError("slurm_option_invalid", f"time is in minutes, {LEAST_MINUTES} or more: not {value!r}")
    return minutes, found


def _queue() -> dict[str, _Queued]:
    """This user's tasks that have not ended, by Slurm's id."""
    fields = "JobArrayID:|,State:|,NodeList:|,RestartCnt:|,Reason:|"
    listing = _run("squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--Format={fields}")
    found = {}
    for line in listing.splitlines():
        job, state, host, restarts, reason, *_ = (field.strip() for field in line.split("|"))
        found[job] = _Queued(state, host, int(restarts), reason)
    return found


def _end(job: str, queued: _Queued, *, now: bool) -> None:
    """Tell a task to end, unless it does already."""
    if queued.state == "COMPLETING":
        return
    signals = [f"--signal={(AT_ONCE if now else DRAIN).name[3:]}"] if queued.state == "RUNNING" else []
    # Its exit status is of no use: the task may have ended meanwhile. Whoever asks the queue again will see.
    subprocess.run(["scancel", *signals, job], capture_output=True, timeout=60)  # noqa: S603, S607


def _run(*command: str) -> str:
    """What a command of Slurm prints. Raises EngineError `slurm_unreachable`."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout  # noqa: S603
    except subprocess.CalledProcessError as error:
        raise EngineError("slurm_unreachable", f"{command[0]}: {_last_line(error.stderr)}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError("slurm_unreachable", str(error)) from None


def _fleet_of(worker: str) -> str:
    return worker.rpartition("-")[0]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "it says nothing"
