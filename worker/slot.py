"""A slot trains one job at a time on a device, or a cohort of jobs of one shape. Its thread claims them, runs an
attempt at each, and claims the next.

A trainer is given job after job. It is replaced when it has ended, or was killed because something of a job might be
left in it; before each claim the slot's lock is taken anew, which proves that no process of an earlier job holds it.
Knows neither torch nor what a job's messages mean. The trainers themselves are started by the main thread.
"""

import math
import os
import threading
import time
from collections.abc import Sequence

import structlog

from service.database.database import Database
from service.errors import DatabaseUnavailable, SchemaMismatch, StorageFull
from service.settings import Settings
from service.storage.installation import FILE as INSTALLATION_FILE
from service.storage.opening import open_store
from worker.attempt import Attempt
from worker.attempts import Attempts
from worker.company import Company
from worker.devices import Device
from worker.held_lease import Lease
from worker.lock import SlotLock, lock_path
from worker.process import Ended, Received, TrainerProcess, WakeUp
from worker.protocol import KeepAlive, Ready
from worker.shared_writes import SharedWrites
from worker.timing import Timing

log = structlog.get_logger(__name__)


class Slot:
    """One trainer at a time on one device."""

    def __init__(
        self,
        db: Database,
        writes: SharedWrites,
        device: Device,
        number: int,
        *,
        slots: int,
        settings: Settings,
        timing: Timing,
        command: Sequence[str],
        draining: threading.Event,
        force_stop: threading.Event,
    ) -> None:
        """`number`: index of this slot among the `slots` of its device. `draining`: the worker is to end once its jobs
        have snapshots; `force_stop`: at once."""
        self._db = db
        self._writes = writes
        self._device = device
        self._settings = settings
        self._timing = timing
        self._command = command
        self._draining = draining
        self._force_stop = force_stop
        self._environment = device.environment(slots)
        self._lock_path = lock_path(device, number, settings)
        self.name = f"{device.name}/{number}"
        self._changed = threading.Event()
        """Set when a claim may succeed that did not before, or when the worker drains."""
        self._trainer: TrainerProcess | None = None
        """The trainer that warms up, or waits for a job."""
        self._is_warm = False
        """Whether that trainer is ready for a job."""
        self._wants_trainer = True
        self._cohort, self._cohort_reason = 1, ""
        """Most jobs of one shape that the trainer is given together, and why."""
        self._running: Company | None = None
        self._idle_since = math.inf
        """Monotonic time since when a warm trainer waits for a job; infinite while none does."""
        self._start_due = 0.0
        self._keep_alive_due = 0.0
        self._store = open_store(settings, retry_seconds=timing.retry)
        self._doubts_store = False
        """Whether the last jobs could not go on here because of the store of files."""
        self._failures = 0
        """Trainers in a row that ended before they were ready."""

    # -- The slot's own thread -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the worker drains: wait for a warm trainer, claim jobs for it, and run an attempt at each."""
        while not self._draining.is_set():
            trainer = self._wait_for_trainer()
            if trainer is None:
                continue
            self._idle_since = time.monotonic()
            claimed = self._wait_for_jobs(trainer)
            self._idle_since = math.inf
            if claimed is not None:
                self._run_attempts(trainer, *claimed)
        if self._trainer is not None:
            self._end(self._trainer)

    def _wait_for_trainer(self) -> TrainerProcess | None:
        """A trainer that has imported torch; None when it failed to, or the worker drains."""
        deadline = time.monotonic() + self._timing.start
        while not self._draining.is_set():
            trainer = self._trainer
            if trainer is None:
                self._draining.wait(self._timing.tick)  # the main thread starts one
                continue
            if self._is_warm:
                return trainer
            message = trainer.next_message(self._timing.tick)
            if isinstance(message, Received) and isinstance(message.message, Ready):
                self._failures, self._is_warm = 0, True
                self._decide_cohort(message.message.cohort)
                return trainer
            if isinstance(message, Ended) or time.monotonic() > deadline:
                self._failures += 1
                pause = min(60.0, self._timing.retry * 2**self._failures)
                self._end(trainer)
                log.error("trainer_did_not_start", slot=self.name, exit_status=trainer.exit_status, next_try_in=pause)
                self._draining.wait(pause)
                self._wants_trainer = True
                return None
        return None

    def _decide_cohort(self, measured: int | None) -> None:
        """Set how many jobs of one shape are claimed together. `measured`: by the trainer, where it was asked to."""
        wanted = self._settings.cohort
        if wanted != "auto":
            width, reason = wanted, "as set"
        elif measured is not None:
            width, reason = measured, "as measured on this machine"
        else:
            width, reason = 1, "could not be measured, see cohort_not_measured"
        if width != self._cohort or self._cohort_reason != reason:
            log.info("cohort_width", slot=self.name, width=width, reason=reason)
            if measured is not None:
                try:
                    self._writes.measured(self._device.name, width)
                except (DatabaseUnavailable, StorageFull) as error:
                    log.warning("cohort_width_not_recorded", slot=self.name, reason=str(error))  # shown, and no more
        self._cohort, self._cohort_reason = width, reason

    def _wait_for_jobs(self, trainer: TrainerProcess) -> tuple[SlotLock, list[Lease]] | None:
        """The slot's lock and the lease of the next job, or of each of a cohort; None when the trainer ended meanwhile,
        or the worker drains."""
        while not self._draining.is_set():
            self._changed.clear()  # before the claim, so that no change is missed between it and the wait
            if trainer.has_ended():
                self._end(trainer)
                self._wants_trainer = True
                return None
            # The lock comes first: it proves that no process of an earlier job is left on this device.
            if self._reaches_store() and (lock := self._take_lock(trainer)) is not None:
                if leases := self._claim():
                    return lock, leases
                lock.close()
            self._changed.wait(self._timing.retry)
        return None

    def _reaches_store(self) -> bool:
        """Whether jobs may be claimed: not from when one could not go on because of the store until that answers again.
        A worker that reaches it may be free, for which the jobs are left."""
        if self._doubts_store:
            try:
                self._store.stat(INSTALLATION_FILE)
            except OSError as error:
                log.warning("store_out_of_reach", slot=self.name, reason=str(error))
                return False
            self._doubts_store = False
        return True

    def _take_lock(self, trainer: TrainerProcess) -> SlotLock | None:
        """The slot's lock in a newly opened file; None while a job holds it."""
        lock: SlotLock | None = None
        try:
            lock = SlotLock(self._lock_path, trainer.token)
            if lock.acquire():
                return lock
        except OSError as error:
            # The disk is full, for example: the other slots must go on.
            log.error("slot_not_locked", slot=self.name, error=str(error))
        if lock is not None:
            lock.close()
        return None

    def _claim(self) -> list[Lease]:
        began = time.monotonic()
        try:
            claims = self._writes.claim(self._cohort)
        except SchemaMismatch as error:
            log.warning("schema_mismatch", reason=str(error))
            self._draining.set()
        except (DatabaseUnavailable, StorageFull) as error:
            log.warning("claim_failed", slot=self.name, reason=str(error))
            self._draining.wait(self._timing.retry)
        else:
            return [Lease(claim, began, self._timing) for claim in claims]
        return []

    def _run_attempts(self, trainer: TrainerProcess, lock: SlotLock, leases: Sequence[Lease]) -> None:
        company = Company(trainer, lock, leases)
        self._running = company
        self._trainer = None
        attempts = [
            Attempt(
                self._db,
                member,
                device=self._device.torch_name,
                settings=self._settings,
                timing=self._timing,
                force_stop=self._force_stop,
            )
            for member in company.members
        ]
        Attempts(
            self._db,
            self._writes,
            company,
            attempts,
            timing=self._timing,
            draining=self._draining,
            force_stop=self._force_stop,
        ).run()
        self._running = None
        self._doubts_store = any(attempt.lacked_store for attempt in attempts)
        if company.trainer_is_idle:
            self._trainer = trainer
        else:
            self._is_warm = False
            self._wants_trainer = True

    def _end(self, trainer: TrainerProcess) -> None:
        self._trainer, self._is_warm = None, False
        while not trainer.kill_and_reap(self._timing.heartbeat):
            log.warning("trainer_does_not_die", slot=self.name, trainer=trainer.pid)

    # -- From other threads ----------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look for jobs or requests again: something was committed, or the worker drains."""
        self._changed.set()
        if running := self._running:
            running.trainer.inbox.put(WakeUp())

    def idle_for(self) -> float:
        """Seconds for which a warm trainer has waited for a job; minus infinity while none does."""
        return time.monotonic() - self._idle_since

    def supervise(self) -> None:
        """The main thread's part: start trainers, send keep-alives, kill a trainer at its lease's deadline."""
        now = time.monotonic()
        if running := self._running:
            for member in running.members_here:
                lease = member.lease
                if now > lease.deadline and not lease.fenced.is_set():
                    log.error("lease_deadline_passed", slot=self.name, job=lease.claim.job_id)
                    lease.fenced.set()
                    member.kill()
        if self._wants_trainer and self._trainer is None and now >= self._start_due and not self._draining.is_set():
            self._start_trainer(now)
        if now >= self._keep_alive_due:
            self._keep_alive_due = now + self._timing.keep_alive
            if running and (present := running.members_here):
                running.trainer.send(KeepAlive(until=min(member.lease.trainer_until for member in present)))
            if warm := self._trainer:
                warm.send(KeepAlive(until=now + self._timing.kill_after))

    def _start_trainer(self, now: float) -> None:
        until = now + self._timing.kill_after
        options = ["--parent", str(os.getpid()), "--until", str(until)]
        if self._device.is_gpu:
            options += ["--gpu", self._device.model]
        if self._settings.cohort == "auto":
            options.append("--measure-cohort")
        try:
            command = [*self._command, *options]
            self._trainer = TrainerProcess(command, self._environment, until=until)
            self._wants_trainer = False
        except OSError as error:
            # No process, no memory, no descriptor: the jobs that run must go on.
            log.error("trainer_not_started", slot=self.name, error=str(error))
            self._start_due = now + self._timing.retry
