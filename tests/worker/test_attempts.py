"""The attempts at the jobs of one trainer, advanced by hand: what becomes of them while the database is away."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from nanomoe.config import JobConfig
from service.database.database import Database
from service.errors import DatabaseUnavailable
from service.jobs import queue, reads
from service.jobs.new_job import NewJob
from service.jobs.recording import Report
from service.jobs.submit import submit_job
from service.jobs.workers import WorkerIdentity
from service.settings import Settings
from tests.databases import ONLY_SQLITE
from tests.worker.workplace import QUICK
from worker import attempts
from worker.attempt import Attempt
from worker.attempts import Attempts
from worker.company import Company
from worker.held_lease import Lease
from worker.lock import SlotLock
from worker.process import Ended, Received
from worker.protocol import Assignment, Done, Idle, Prepared, Start, Steps, Warned
from worker.shared_writes import SharedWrites

TIMING = replace(QUICK, retry=0.01, record=0.05, heartbeat=10.0)


class ScriptedTrainer:
    """A trainer that says all that it has to say as soon as it has its jobs."""

    pid, exit_status = 1, -9

    def __init__(self, says: Callable[[Assignment], list[Any]], last: Any) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self._says, self._last = says, last

    def train(self, starts: Sequence[Start], lock: SlotLock) -> None:
        lock.close()
        for start in starts:
            for message in self._says(start.assignment):
                self.inbox.put(Received(message, start.assignment))
        self.inbox.put(self._last)

    def next_message(self, timeout: float = 0.0) -> Any:
        try:
            return self.inbox.get(timeout=timeout) if timeout > 0 else self.inbox.get_nowait()
        except Empty:
            return None

    def send(self, *_: Any) -> None: ...

    def wake(self) -> None: ...

    def kill(self) -> None: ...

    def is_alone(self) -> bool:
        return True

    def kill_and_reap(self, timeout: float) -> bool:
        return True


def prepared() -> Prepared:
    return Prepared(
        execution={"device": "cpu", "micro_batch": 1}, n_tokens=9, total_steps=2, n_params=1, n_active_params=1,
        resumed_at_step=None, warnings=[],
    )  # fmt: skip


def steps(first: int) -> Steps:
    return Steps(step=[first], train_loss=[1.0], lr=[1.0], grad_norm=[1.0], tok_per_sec=1.0, epoch=1)


def work(_: Assignment) -> list[Any]:
    warned = Warned(code="w", message="halfway")
    return [prepared(), steps(1), warned, steps(2), Done(outcome="succeeded")]


IDLE = Received(Idle(), None)


class Place:
    """Claimed jobs of one cohort, and what is written about them."""

    def __init__(self, db: Database, settings: Settings, folder: Path, n: int) -> None:
        for seed in range(n):
            config = JobConfig(seed=seed).model_dump(mode="json")
            submit_job(db, NewJob(text="uma frase", config=config, cohort_key="one", total_steps=2))
        self._db, self._settings, self._folder = db, settings, folder
        worker = WorkerIdentity()
        self.writes = SharedWrites(db, worker)
        self.leases = [Lease(claim, 0.0, TIMING) for claim in self.writes.claim(n)]
        for lease in self.leases:
            lease.renewed(1e9)
        self.force_stop = threading.Event()

    def run(self, trainer: ScriptedTrainer) -> Company:
        lock = SlotLock(self._folder / "lock", "token")
        assert lock.acquire()
        company = Company(trainer, lock, self.leases)  # type: ignore[arg-type]
        how: dict[str, Any] = {"settings": self._settings, "timing": TIMING, "force_stop": self.force_stop}
        members = [Attempt(self._db, member, device="cpu", **how) for member in company.members]
        how = {"timing": TIMING, "draining": threading.Event(), "force_stop": self.force_stop}
        Attempts(self._db, self.writes, company, members, **how).run()
        return company

    def away(self, n_times: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Let the next reports and ends find the database out of reach."""
        for name in ("report", "finish", "release"):
            together = getattr(self.writes, name)
            really_do, left = together._do, [n_times]

            def do(requests: Any, really_do: Any = really_do, left: list[int] = left) -> Any:
                if left[0]:
                    left[0] -= 1
                    meanwhile()
                    raise DatabaseUnavailable("away")
                return really_do(requests)

            together._do = do

    def statuses(self) -> list[str]:
        return [reads.get_job(self._db, lease.claim.job_id).status for lease in self.leases]


@pytest.fixture
def place(db: Database, settings: Settings, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(db, settings, tmp_path, request.param)


each_number = pytest.mark.parametrize("place", [1, 3], indirect=True, ids=["alone", "together"])


@ONLY_SQLITE
@each_number
def test_what_could_not_be_written_is_written_once_the_database_is_back(place: Place, db: Database) -> None:
    place.away(3)
    company = place.run(ScriptedTrainer(work, IDLE))
    assert company.trainer_is_idle
    assert set(place.statuses()) == {"succeeded"}
    for lease in place.leases:
        assert reads.series(db, lease.claim.job_id)["step"] == [1, 2]
        events = reads.events_after(db, lease.claim.job_id, 0)
        assert [event.data.get("code", event.data.get("status")) for event in events] == [
            "queued", "running", "w", "succeeded",
        ]  # fmt: skip
        assert reads.get_job(db, lease.claim.job_id).progress["step"] == 2


@ONLY_SQLITE
@each_number
def test_what_waits_at_the_deadline_is_not_written_any_more(place: Place, db: Database) -> None:
    place.away(2, lambda: [lease.fenced.set() for lease in place.leases])
    place.run(ScriptedTrainer(work, Ended()))
    assert set(place.statuses()) == {"queued"}
    for lease in place.leases:
        assert reads.series(db, lease.claim.job_id)["step"] == []


@ONLY_SQLITE
@each_number
def test_a_worker_that_must_end_at_once_does_not_wait_for_the_database(place: Place) -> None:
    place.away(1000, place.force_stop.set)
    place.run(ScriptedTrainer(work, IDLE))
    assert set(place.statuses()) == {"running"}  # until their leases pass


@ONLY_SQLITE
@each_number
def test_nothing_is_written_to_a_job_that_another_worker_has(place: Place, db: Database) -> None:
    lost = place.leases[0]
    queue.release(db, lost.claim)
    place.run(ScriptedTrainer(work, IDLE))
    assert place.statuses() == ["queued", *["succeeded"] * (len(place.leases) - 1)]
    assert reads.series(db, lost.claim.job_id)["step"] == []


@ONLY_SQLITE
@each_number
def test_a_report_that_cannot_be_written_fails_its_own_job_alone(place: Place, db: Database) -> None:
    broken = place.leases[-1].claim.job_id

    def work_or_break(assignment: Assignment) -> list[Any]:
        messages = work(assignment)
        if assignment.job_id == broken:
            messages[1] = messages[1].model_copy(update={"step": ["no number"]})
        return messages

    place.run(ScriptedTrainer(work_or_break, IDLE))
    assert place.statuses() == [*["succeeded"] * (len(place.leases) - 1), "queued"]
    assert reads.get_job(db, broken).crashes == 1


@ONLY_SQLITE
@each_number
def test_no_transaction_takes_more_than_some_steps_however_many_wait(
    place: Place, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_MOST_STEPS", 4 * len(place.leases))
    sizes: list[int] = []
    really_do = place.writes.report._do

    def do(reports: Sequence[Report]) -> Any:
        sizes.extend(len(report.steps["step"]) for report in reports if report.steps)
        return really_do(reports)

    place.writes.report._do = do
    many = Steps(
        step=list(range(1, 11)), train_loss=[1.0] * 10, lr=[1.0] * 10, grad_norm=[1.0] * 10, tok_per_sec=1.0, epoch=1
    )
    place.run(ScriptedTrainer(lambda _: [prepared(), many, steps(11), Done(outcome="succeeded")], IDLE))
    assert sizes.count(4) >= 2 * len(place.leases)
    assert max(sizes) == 4
    for lease in place.leases:
        assert reads.series(db, lease.claim.job_id)["step"] == list(range(1, 12))
        assert reads.get_job(db, lease.claim.job_id).progress["step"] == 11
    assert set(place.statuses()) == {"succeeded"}
