"""The worker's first process: it starts trainers, claims jobs for them and is the only one that writes to the database.

The main thread starts the trainers, sends them keep-alives, and kills each at its lease's deadline; each slot has a
thread that uses the database, and may wait for it; one more thread does maintenance: the worker's own row, the rescue
of jobs whose worker is gone, and the removal of orphaned files. Never imports torch, and knows no HTTP.
"""

import importlib.metadata
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from nanomoe.store.local import LocalStore
from nanomoe.store.store import StoreUnavailable
from service.database.database import Database
from service.errors import DatabaseUnavailable, NotInstalled, SchemaMismatch, StorageFull
from service.jobs.rescuer import Rescuer
from service.jobs.workers import WorkerIdentity, worker_seen, worker_started, worker_stopped
from service.settings import Settings
from service.storage.installation import join_installation
from service.storage.opening import REQUEST_RETRY_SECONDS, open_store
from service.storage.orphans import sweep_orphans, sweep_scratch
from worker.compiler import STEP_PATH_VARIABLE, start_compiler
from worker.devices import Device
from worker.shared_writes import SharedWrites
from worker.slot import Slot
from worker.timing import Timing

log = structlog.get_logger(__name__)


TRAINER = (sys.executable, "-m", "worker.trainer")


class Supervisor:
    """One run of the worker."""

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
        idle_seconds: float | None = None,
        parent: int | None = None,
    ) -> None:
        """`slots`: trainers per device. `command` starts a trainer. `idle_seconds`: time without a job after which the
        worker ends by itself. `parent`: id of the process that started this one, with which it drains."""
        self._db = db
        self._settings = settings
        self._store = open_store(settings, retry_seconds=REQUEST_RETRY_SECONDS)
        self._timing = timing or Timing.of(settings)
        self._draining = threading.Event()
        self._force_stop = threading.Event()
        self._stopped = threading.Event()
        self._signals = 0
        self._idle_seconds = math.inf if idle_seconds is None else idle_seconds
        self._parent = parent
        self._trains_on_cpu = not all(device.is_gpu for device in devices)
        self._failed = False
        self.worker = WorkerIdentity(
            name=name or platform.node(),
            devices=[device.row for device in devices],
            slots=slots * len(devices),
            lease_seconds=self._timing.lease,
            versions={"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
            cohort=1 if settings.cohort == "auto" else settings.cohort,
            memory_bytes=min(device.memory_bytes for device in devices),
        )
        writes = SharedWrites(db, self.worker)
        self._slots = [
            Slot(
                db,
                writes,
                device,
                number,
                slots=slots,
                settings=settings,
                timing=self._timing,
                command=command,
                draining=self._draining,
                force_stop=self._force_stop,
            )
            for device in devices
            for number in range(slots)
        ]

    def stop(self, *_: object) -> None:
        """Drain: every job writes a snapshot and returns to the queue. A second call ends the worker at once, and jobs
        resume from their last snapshot.

        Safe in a signal handler: it only counts; the main loop acts.
        """
        self._signals += 1

    def run(self) -> int:
        """Work until `stop` is called, the parent has ended, or no slot has had a job for the idle time. The exit
        status: 0, or 1 when a thread ended with an unexpected exception.

        Raises StartRefused when database and store do not belong together.
        """
        if not self._register():
            return 0
        slots = [slot.name for slot in self._slots]
        log.info("worker_started", worker=self.worker.id, slots=slots)
        if self._trains_on_cpu and STEP_PATH_VARIABLE not in os.environ:
            start_compiler(self._settings.log_format)
        unsubscribe = self._db.changes.subscribe(self._wake_slots)
        # Daemons: should this thread fail, the process ends, and every trainer with it, so that none is unsupervised.
        threads = [self._thread(slot.run, slot.name) for slot in self._slots]
        maintenance = self._thread(self._maintain, "maintenance")
        for thread in (*threads, maintenance):
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self._stop_in_time()
            for slot in self._slots:
                slot.supervise()
            time.sleep(self._timing.tick)
        unsubscribe()
        self._stopped.set()
        maintenance.join(self._timing.stop_grace)
        self._record_stop()
        return 1 if self._failed else 0

    def _thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        return threading.Thread(target=self._run_thread, args=[work], name=name, daemon=True)

    def _run_thread(self, work: Callable[[], None]) -> None:
        """The body of each thread. The worker drains when one of them fails."""
        try:
            work()
        except Exception:
            # A bug: shut down in order, and let the service manager restart the worker.
            log.exception("thread_failed", thread=threading.current_thread().name)
            self._failed = True
            self._draining.set()

    def _stop_in_time(self) -> None:
        """Begin to drain, or to end at once, when there is a reason to."""
        if not self._draining.is_set() and (reason := self._reason_to_drain()):
            log.info("draining", reason=reason)
            self._draining.set()
        if self._signals > 1 and not self._force_stop.is_set():
            log.warning("stopping_immediately")
            self._force_stop.set()
        if self._draining.is_set():
            self._wake_slots()

    def _reason_to_drain(self) -> str | None:
        if self._signals:
            return "signal"
        if self._parent is not None and os.getppid() != self._parent:
            # Asked, and not signalled by the kernel: that signal follows the thread that started this process.
            return "parent_ended"
        # A slot that claims at this very moment gives its job back to the queue untouched.
        if all(slot.idle_for() >= self._idle_seconds for slot in self._slots):
            return "idle"
        return None

    def _wake_slots(self) -> None:
        for slot in self._slots:
            slot.wake()

    def _register(self) -> bool:
        """Insert the worker's row, once the API has migrated the schema to this code's revision and has given the
        database its id; False when there was a reason to stop before."""
        reported = None
        while self._reason_to_drain() is None:
            try:
                self._db.check_revision()
                join_installation(self._db, self._store)
                worker_started(self._db, self.worker)
            except (SchemaMismatch, NotInstalled, DatabaseUnavailable, StorageFull, StoreUnavailable) as error:
                if str(error) != reported:
                    reported = str(error)
                    log.info("waiting_for_database", reason=reported)
                time.sleep(self._timing.tick)
            else:
                return True
        return False

    def _maintain(self) -> None:
        """Update the worker's row, rescue jobs of dead workers, and remove files that no row refers to, each when
        due."""
        rescuer = Rescuer(self._db, self._timing.rescue)
        sweeping: threading.Thread | None = None
        seen_due = rescue_due = sweep_due = time.monotonic()
        while not self._stopped.wait(max(0.0, min(seen_due, rescue_due, sweep_due) - time.monotonic())):
            now = time.monotonic()
            try:
                if now >= seen_due:
                    seen_due = now + self._timing.heartbeat
                    worker_seen(self._db, self.worker.id)
                if now >= rescue_due:
                    rescue_due = now + self._timing.rescue
                    for job in rescuer.round():
                        log.warning("job_rescued", job=job.id, status=job.status, status_reason=job.status_reason)
                if now >= sweep_due:
                    sweep_due = now + self._timing.sweep
                    if self._store.is_local:
                        self._sweep()
                    elif sweeping is None or not sweeping.is_alive():
                        # A large bucket is listed for minutes, and this worker must be seen meanwhile.
                        sweeping = threading.Thread(target=self._sweep_bucket, name="sweep", daemon=True)
                        sweeping.start()
            except (DatabaseUnavailable, StorageFull) as error:
                log.warning("database_out_of_reach", reason=str(error))
            except OSError as error:  # the data folder; the worker's row and the rescue must go on
                log.warning("orphans_not_removed", reason=str(error))

    def _sweep(self) -> None:
        for path in sweep_orphans(self._db, self._store):
            log.info("orphan_removed", path=path)

    def _sweep_bucket(self) -> None:
        try:
            self._sweep()
            sweep_scratch(self._db, LocalStore(self._settings.data_dir))
        except (DatabaseUnavailable, OSError) as error:
            log.warning("orphans_not_removed", reason=str(error))

    def _record_stop(self) -> None:
        try:
            worker_stopped(self._db, self.worker.id)
        except (DatabaseUnavailable, StorageFull) as error:
            log.warning("database_out_of_reach", reason=str(error))
        log.info("worker_stopped", worker=self.worker.id, transactions=self._db.n_writes())
