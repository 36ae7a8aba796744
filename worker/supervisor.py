"""The worker's first process: it starts trainers, claims jobs for them and is the only one that writes to the database.

The main thread starts the trainers, tells them that it lives, and kills those whose lease is no longer certain; each
slot has a thread that talks to the database, and may wait for it; one more thread keeps the house: the worker's own
row, and the rescue of jobs whose worker is gone. Never imports torch, and knows no HTTP.
"""

import importlib.metadata
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from service.errors import DatabaseUnavailable, NotInstalled, SchemaMismatch, StorageFull
from service.jobs import queue, store
from service.jobs.store import Database, WorkerIdentity
from service.settings import Settings
from worker.compiler import STEP_PATH_VARIABLE, start_compiler
from worker.devices import Device
from worker.slot import Slot
from worker.timing import Timing

log = structlog.get_logger(__name__)

TRAINER = (sys.executable, "-m", "worker.trainer")


class Supervisor:
    """A boot of the worker."""

    def __init__(
        self,
        db: Database,
        devices: Sequence[Device],
        settings: Settings,
        *,
        slots: int = 1,
        name: str | None = None,
        timing: Timing | None = None,
        command: Sequence[str] = TRAINER,
    ) -> None:
        """`slots`: trainers per device. `command` starts a trainer."""
        self._db = db
        self._settings = settings
        self._timing = timing or Timing.of(settings)
        self._draining = threading.Event()
        self._hurry = threading.Event()
        self._stopped = threading.Event()
        self._signals = 0
        self._trains_on_cpu = not all(device.is_gpu for device in devices)
        self._failed = False
        self.worker = WorkerIdentity(
            name=name or platform.node(),
            devices=[device.row for device in devices],
            slots=slots * len(devices),
            lease_seconds=self._timing.lease,
            versions={"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
            memory_bytes=min(device.memory_bytes for device in devices),
        )
        self._slots = [
            Slot(
                db,
                self.worker,
                device,
                number,
                slots=slots,
                settings=settings,
                timing=self._timing,
                command=command,
                draining=self._draining,
                hurry=self._hurry,
            )
            for device in devices
            for number in range(slots)
        ]

    def stop(self, *_: object) -> None:
        """Drain: every job leaves a snapshot and goes back to the queue. Asked twice: at once, from the last snapshot.

        Safe in a signal handler: it only counts, and the main loop looks.
        """
        self._signals += 1

    def run(self) -> int:
        """Work until told to stop. The exit status: 0, or 1 when a thread ended by a fault of ours.

        Raises StartRefused when database and data folder do not belong together.
        """
        if not self._join():
            return 0
        log.info("worker_started", worker=self.worker.id, slots=[slot.name for slot in self._slots])
        if self._trains_on_cpu and STEP_PATH_VARIABLE not in os.environ:
            start_compiler(self._settings.log_format)
        unsubscribe = self._db.changes.subscribe(self._wake_slots)
        # Daemons: should this thread fail, the process ends, and every trainer with it. Nobody trains unguarded.
        threads = [
            threading.Thread(target=self._do, args=[slot.run], name=slot.name, daemon=True) for slot in self._slots
        ]
        housekeeper = threading.Thread(target=self._do, args=[self._keep_house], name="housekeeper", daemon=True)
        for thread in (*threads, housekeeper):
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self._notice_signals()
            for slot in self._slots:
                slot.tend()
            time.sleep(self._timing.guard)
        unsubscribe()
        self._stopped.set()
        housekeeper.join(self._timing.stop_grace)
        self._say_goodbye()
        return 1 if self._failed else 0

    def _do(self, work: Callable[[], None]) -> None:
        """All that a thread does. Without one of its slots, or without its house kept, a worker is none."""
        try:
            work()
        except Exception:
            # A fault of ours: end in good order, and let whoever started the worker start it again.
            log.exception("thread_failed", thread=threading.current_thread().name)
            self._failed = True
            self._draining.set()

    def _notice_signals(self) -> None:
        if self._signals and not self._draining.is_set():
            log.info("draining")
            self._draining.set()
        if self._signals > 1 and not self._hurry.is_set():
            log.warning("ending_at_once")
            self._hurry.set()
        if self._draining.is_set():
            self._wake_slots()

    def _wake_slots(self) -> None:
        for slot in self._slots:
            slot.wake()

    def _join(self) -> bool:
        """Enter the list of workers, once the API has brought the schema to this code's revision and has given the
        database its id; False when told to stop before."""
        said = None
        while not self._signals:
            try:
                self._db.check_revision()
                store.join_installation(self._db, self._settings.data_dir)
                store.worker_started(self._db, self.worker)
            except (SchemaMismatch, NotInstalled, DatabaseUnavailable, StorageFull) as error:
                if str(error) != said:
                    said = str(error)
                    log.info("waiting_for_database", reason=said)
                time.sleep(self._timing.guard)
            else:
                return True
        return False

    def _keep_house(self) -> None:
        """The worker's row, a rescue round now and then, and a sweep of the files that no row refers to."""
        rescuer = queue.Rescuer(self._db, self._timing.rescue)
        seen_due = rescue_due = sweep_due = time.monotonic()
        while not self._stopped.wait(max(0.0, min(seen_due, rescue_due, sweep_due) - time.monotonic())):
            now = time.monotonic()
            try:
                if now >= seen_due:
                    seen_due = now + self._timing.heartbeat
                    store.worker_seen(self._db, self.worker.id)
                if now >= rescue_due:
                    rescue_due = now + self._timing.rescue
                    for job in rescuer.round():
                        log.warning("rescued", job=job.id, status=job.status, status_reason=job.status_reason)
                if now >= sweep_due:
                    sweep_due = now + self._timing.sweep
                    for path in store.sweep_orphans(self._db, self._settings.data_dir):
                        log.info("swept", path=path)
            except (DatabaseUnavailable, StorageFull) as error:
                log.warning("database_out_of_reach", reason=str(error))
            except OSError as error:  # the data folder; the worker's row and the rescue must go on
                log.warning("cannot_sweep", reason=str(error))

    def _say_goodbye(self) -> None:
        try:
            store.worker_stopped(self._db, self.worker.id)
        except (DatabaseUnavailable, StorageFull) as error:
            log.warning("database_out_of_reach", reason=str(error))
        log.info("worker_stopped", worker=self.worker.id)
