"""A worker process for tests: the real supervisor, with the test's timing and trainer.

Forked from a server that has imported the supervisor already, to spare the second that takes.
"""

import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from nanomoe import checkpoint
from nanomoe.logs import configure_logging
from nanomoe.store.store import Store
from service.database import engine_options
from service.database.database import Database
from service.database.opening import open_database
from service.jobs import queue, recording
from service.settings import Settings
from tests.faults.next_death import NextDeath
from tests.namespaces import enter
from tests.worker.warm_trainers import WarmTrainers
from worker import attempt, process
from worker.devices import find_devices
from worker.lock import SlotLock
from worker.memory import oom_kills
from worker.process import TrainerProcess
from worker.slot import Slot
from worker.supervisor import TRAINER, Supervisor
from worker.timing import Timing


def remove(protection: str) -> None:
    """Patch one protection out of this process."""
    match protection:
        case "the slot's lock":
            SlotLock.acquire = lambda self: True  # type: ignore[method-assign]
        case "the deadline":
            Slot.supervise = _supervise_without_deadline  # type: ignore[method-assign]
        case "keep-alive":
            Slot.supervise = _supervise_without_keep_alive  # type: ignore[method-assign]
        case "kill and reap":
            TrainerProcess.kill_and_reap = _reap_the_trainer_alone  # type: ignore[method-assign]
        case "the search for survivors":
            TrainerProcess.is_alone = lambda self: True  # type: ignore[method-assign]
        case _:
            raise ValueError(protection)


_supervise = Slot.supervise


def _supervise_without_deadline(self: Slot) -> None:
    for member in () if self._running is None else self._running.members:
        member.lease.deadline = member.lease.trainer_until = time.monotonic() + 1000
    _supervise(self)


def _supervise_without_keep_alive(self: Slot) -> None:
    self._keep_alive_due = math.inf
    _supervise(self)


def _reap_the_trainer_alone(self: TrainerProcess, timeout: float) -> bool:
    self._popen.kill()
    self._popen.wait()
    return True


def slow_down_the_disk(seconds: float) -> None:
    """Let every file that is verified take that long, in many pieces."""
    pieces = checkpoint._pieces

    def slow(folder: Store, entry: checkpoint.FileEntry, *, to_be_read: bool = False) -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(seconds / 100)
            yield b""
        yield from pieces(folder, entry, to_be_read=to_be_read)

    checkpoint._pieces = slow


def die_at(write: str, number: int) -> None:
    """Be killed instead of beginning the report with this number, from 1, of a kind of `service.jobs.recording`."""
    really_write, calls = getattr(recording, write), itertools.count(1)

    def write_or_die(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return really_write(*arguments, **options)

    setattr(recording, write, write_or_die)


def die_as_ordered(db: Database, file: Path) -> None:
    """Be killed before a statement or a commit, where that file orders it (`next_death.py`)."""
    death = NextDeath(file)
    for event in ("before_cursor_execute", "commit"):
        sa.event.listen(db.engine, event, lambda *_: death.line())


def note_batches(file: str) -> None:
    """Write a line for each transaction about running jobs: what is recorded, and of how many, heartbeats apart."""

    def noting(module: Any, name: str, counts: Callable[[Any], bool]) -> None:
        really_write = getattr(module, name)

        def write(db: Database, requests: Sequence[Any]) -> Any:
            if n := sum(map(counts, requests)):
                with Path(file).open("a") as noted:
                    noted.write(f"{name} {n}\n")
            return really_write(db, requests)

        setattr(module, name, write)

    noting(recording, "record_reports", lambda report: report.steps is not None or report.write is not None)
    noting(queue, "finish_jobs", lambda _: True)
    noting(queue, "release_jobs", lambda _: True)


def run(spec: dict[str, Any]) -> None:
    """The whole life of a worker process. `spec`: `settings`, `environment`, `timing`, `device`, `slots`, `command`,
    `max_crashes`, `backoff_seconds`, `slow_disk_seconds`, `dies_at`, `busy_seconds`, `batches`: a file, unless None, to
    note them in; `death`: the file of its next death, unless None; `log`: a file that takes the place of standard
    error, unless None; `host`: the first process of the host to run on, unless None; `without`: protections that are
    taken away, to show that they are needed; and `warm`: whether trainers are forked from a warm process.
    What the kernel has killed for want of memory is read from `memory.events` in the data folder."""
    if spec["host"] is not None:
        enter(spec["host"])
    os.chdir(spec["folder"])
    os.environ.update(spec["environment"])
    sys.exit(_run(spec))


def _run(spec: dict[str, Any]) -> int:
    if spec["log"] is not None:
        os.dup2(os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    configure_logging("console")
    if spec["warm"]:
        process.subprocess = WarmTrainers()  # type: ignore[assignment]
    settings = Settings(_env_file=None, **spec["settings"])
    engine_options.LOCK_TIMEOUT_SECONDS = spec["busy_seconds"]
    queue.MAX_CRASHES = spec["max_crashes"]
    queue.BACKOFF = timedelta(seconds=spec["backoff_seconds"])
    attempt.oom_kills = lambda: oom_kills(settings.data_dir / "memory.events")
    for protection in spec["without"]:
        remove(protection)
    if spec["slow_disk_seconds"]:
        slow_down_the_disk(spec["slow_disk_seconds"])
    if spec["dies_at"] is not None:
        die_at(*spec["dies_at"])
    if spec["batches"] is not None:
        note_batches(spec["batches"])
    with closing(open_database(settings)) as db:
        if spec["death"] is not None:
            die_as_ordered(db, Path(spec["death"]))
        supervisor = Supervisor(
            db,
            find_devices(spec["device"]),
            settings,
            slots=spec["slots"],
            timing=Timing(**spec["timing"]),
            command=spec["command"] or TRAINER,
            idle_seconds=spec["idle_seconds"],
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, supervisor.stop)
        return supervisor.run()
