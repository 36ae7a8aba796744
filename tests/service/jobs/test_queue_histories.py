"""Any history of the queue that Hypothesis can think of, on both databases, against five promises.

The fence only grows, a job ends once, nothing is written under an old fence, a job that has ended has no snapshot, and
jobs keep their order however the clock jumps.
"""

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from service.database.database import Database
from service.database.schema import table
from service.errors import Conflict, LeaseLost
from service.jobs import queue, reads, recording
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob
from service.jobs.statuses import TERMINAL
from service.jobs.tables import Job, Text, Worker
from service.jobs.workers import WorkerIdentity, worker_seen, worker_started
from tests.databases import Clock

LEASE = 60.0
MAY_BECOME = {
    "queued": {"running", "paused", "cancelled"},
    "running": {"queued", "paused", "succeeded", "failed", "cancelled"},
    "paused": {"queued", "cancelled"},
    "succeeded": set(),
    "failed": set(),
    "cancelled": set(),
}


def out_of_memory(db: Database, claim: Claim) -> Job:
    decided = {"execution": {"micro_batch": 4}, "model": {"n_params": 1, "n_active_params": 1}}
    recording.record_prepared(db, claim, n_tokens=9, total_steps=4, **decided)
    return queue.release_out_of_memory(db, claim, micro_batch=2, reason="memory ran out", warnings=[{"code": "w"}])


OWNERS_WRITES: dict[str, Any] = {
    "heartbeat": lambda db, claim: recording.heartbeat(db, claim, {"step": 1}),
    "steps": lambda db, claim: recording.record_steps(
        db, claim, {"step": [1], "train_loss": [float(claim.fence)], "lr": [0.1], "grad_norm": [1.0]}
    ),
    "checkpoint": lambda db, claim: recording.record_checkpoint(
        db, claim, percent=0, step=0, epoch=0, folder=f"f{claim.fence}", manifest_sha256="m", files=[], metrics={}
    ),
    "snapshot": lambda db, claim: recording.record_snapshot(
        db, claim, step=1, folder=f"f{claim.fence}", manifest_sha256="m"
    ),
    "rewind": lambda db, claim: recording.rewind(db, claim, 0),
    "succeed": lambda db, claim: queue.finish(db, claim, "succeeded"),
    "fail": lambda db, claim: queue.finish(db, claim, "failed", error={"code": "e", "message": "m"}),
    "drain": lambda db, claim: queue.release(db, claim),
    "crash": lambda db, claim: queue.release(db, claim, crash="signal 9"),
    "out of memory": out_of_memory,
    "pause": lambda db, claim: queue.release(db, claim, pause_reason="the disk is full"),
    "external_cause": lambda db, claim: queue.release(db, claim, external_cause="no file can be opened"),
}


class Histories(RuleBasedStateMachine):
    """Users, workers, rescuers and the clock, in any order."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def __init__(self, db: Database, clock: Clock) -> None:
        super().__init__()
        self.db = db
        self.clock = clock
        self.before: dict[str, Job] = {}
        self.ended: dict[str, int] = {}
        self.submitted: list[str] = []

    @initialize()
    def begin(self) -> None:
        self.workers = [WorkerIdentity(name=str(number)) for number in range(2)]
        for worker in self.workers:
            worker_started(self.db, worker)

    @rule(target=jobs, priority=st.integers(0, 1), seconds=st.none() | st.sampled_from([-20, 20, 500]))
    def submit(self, priority: int, seconds: float | None) -> str:
        run_at = None if seconds is None else self.clock.now + timedelta(seconds=seconds)
        job, _ = queue.submit(self.db, NewJob(text="a b", config={}, priority=priority, run_at=run_at))
        self.before[job.id] = job
        self.submitted.append(job.id)
        return job.id

    @rule(target=claims, number=st.integers(0, 1))
    def claim(self, number: int) -> Any:
        claimable = [job for job in self.with_status("queued") if self.may_start(job)]
        found = queue.claim(self.db, self.workers[number], LEASE)
        if found is None:
            assert not claimable
            return multiple()
        assert found.job_id == min(claimable, key=lambda job: (-job.priority, self.submitted.index(job.id))).id
        assert found.fence == self.before[found.job_id].fence + 1
        return found

    @rule(claim=claims, write=st.sampled_from(sorted(OWNERS_WRITES)))
    def worker_writes(self, claim: Claim, write: str) -> None:
        row = self.before[claim.job_id]
        owns = row.status == "running" and row.fence == claim.fence
        recorded = self.recorded(claim.job_id)
        try:
            OWNERS_WRITES[write](self.db, claim)
        except LeaseLost:
            assert not owns
            assert reads.get_job(self.db, claim.job_id) == row
            assert self.recorded(claim.job_id) == recorded
        else:
            assert owns

    @rule(job_id=jobs, ask=st.sampled_from([queue.request_cancel, queue.request_pause, queue.resume]))
    def user_asks(self, job_id: str, ask: Any) -> None:
        row = self.before[job_id]
        try:
            ask(self.db, job_id)
        except Conflict:
            assert row.status in TERMINAL
            assert reads.get_job(self.db, job_id) == row

    @rule(number=st.integers(0, 1))
    def worker_is_seen(self, number: int) -> None:
        worker_seen(self.db, self.workers[number].id)

    @rule()
    def rescue(self) -> None:
        now = self.clock.now
        left = {job.id: job.lease_until - now for job in self.with_status("running") if job.lease_until is not None}
        holds = (timedelta(0), timedelta(seconds=2 * LEASE))
        expected = {job_id for job_id, lease in left.items() if not holds[0] <= lease <= holds[1]}
        assert {job.id for job in queue.rescue(self.db)} == expected

    @rule(seconds=st.sampled_from([1, 20, 61, 1000, -30, -7200]))
    def time_passes_or_the_clock_is_set_back(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def promises_hold(self) -> None:
        found = {job.id: job for job in reads.list_jobs(self.db, limit=100)}
        assert list(found) == self.submitted[::-1]
        for job_id, before in self.before.items():
            job = found[job_id]
            if job == before:
                continue
            assert job.seq == before.seq
            assert job.fence - before.fence in (0, 1)
            if before.status in TERMINAL:
                assert job == before
            if job.status != before.status:
                assert job.status in MAY_BECOME[before.status]
                self.ended[job_id] = self.ended.get(job_id, 0) + (job.status in TERMINAL)
            assert (job.fence > before.fence) == (job.status == "running" != before.status)
            assert self.ended.get(job_id, 0) <= 1
            self.before[job_id] = job
            assert job.status not in TERMINAL or reads.find_snapshot(self.db, job_id) is None
            events = reads.events_after(self.db, job_id, 0)
            assert [event.seq for event in events] == list(range(1, job.event_seq + 1))
            assert [event.data["status"] for event in events if event.kind == "status"][-1] == job.status

    def with_status(self, status: str) -> list[Job]:
        return [job for job in self.before.values() if job.status == status]

    def may_start(self, job: Job) -> bool:
        now = self.clock.now
        if job.run_at is not None and job.run_at > now:
            return False
        if job.waits_since is None or job.waits_seconds is None or now < job.waits_since:
            return True
        return now - job.waits_since >= timedelta(seconds=job.waits_seconds)

    def recorded(self, job_id: str) -> Any:
        snapshot = reads.find_snapshot(self.db, job_id)
        return reads.series(self.db, job_id), reads.list_checkpoints(self.db, job_id), snapshot

    def teardown(self) -> None:
        with self.db.write() as session:
            for rows in (Job, Text, Worker):
                session.execute(sa.delete(table(rows)))


def test_no_history_breaks_a_promise(db: Database, clock: Clock) -> None:
    run_state_machine_as_test(
        lambda: Histories(db, clock),
        settings=settings(max_examples=15, stateful_step_count=25, suppress_health_check=list(HealthCheck)),
    )
