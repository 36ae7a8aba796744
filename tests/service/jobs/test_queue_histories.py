"""Any history of the queue that Hypothesis can think of, on both databases, against six promises.

The fence only grows, a job ends once, nothing is written under an old fence, a job that has ended has no snapshot, jobs
keep their order however the clock jumps, and what happens to a member of a cohort is no other's concern.
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
from service.jobs.cohorts import Candidate, company
from service.jobs.lease import Claim, only
from service.jobs.new_job import NewJob, NewSweep
from service.jobs.queue import Finish, Release
from service.jobs.recording import Report
from service.jobs.statuses import TERMINAL
from service.jobs.submit import submit_job, submit_sweep
from service.jobs.tables import Job, Sweep, Text, Worker
from service.jobs.workers import WorkerIdentity, worker_seen, worker_started
from tests.databases import Clock
from tests.queued import release_from_company

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
    end = Release(claim, micro_batch=2, interrupted="memory ran out", warnings=[{"code": "w"}])
    return only(queue.release_jobs(db, [end]))


STEPS = {"step": [1], "train_loss": [1.0], "lr": [0.1], "grad_norm": [1.0]}
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
    "out of memory in company": lambda db, claim: release_from_company(db, claim, 2),
    "pause": lambda db, claim: queue.release(db, claim, pause_reason="the disk is full"),
    "external_cause": lambda db, claim: queue.release(db, claim, external_cause="no file can be opened"),
}


ENDS_OF_A_TRAINER: dict[str, Any] = {
    "it dies": OWNERS_WRITES["crash"],
    "memory runs out": lambda db, claim: release_from_company(db, claim, max(1, (claim.job.cohort_size or 1) // 2)),
    "the worker drains": OWNERS_WRITES["drain"],
    "another member does not stop": lambda db, claim: queue.release(db, claim),
}
"""What becomes of each job that a trainer has when it ends."""

REQUESTS = {
    queue.request_cancel_sweep: {"cancelled"},
    queue.request_pause_sweep: {"paused"},
    queue.resume_sweep: {"queued", "running"},
}
"""What may be asked of a sweep, and the statuses of jobs for which nothing needs to be done."""


class Histories(RuleBasedStateMachine):
    """Users, workers, rescuers and the clock, in any order."""

    jobs = Bundle("jobs")
    sweeps = Bundle("sweeps")
    claims = Bundle("claims")

    def __init__(self, db: Database, clock: Clock) -> None:
        super().__init__()
        self.db = db
        self.clock = clock
        self.before: dict[str, Job] = {}
        self.ended: dict[str, int] = {}
        self.claimed: list[Claim] = []
        self.submitted: list[str] = []

    @initialize()
    def begin(self) -> None:
        self.workers = [WorkerIdentity(name=str(number)) for number in range(2)]
        for worker in self.workers:
            worker_started(self.db, worker)

    @rule(
        target=jobs,
        priority=st.integers(0, 1),
        seconds=st.none() | st.sampled_from([-20, 20, 500]),
        key=st.sampled_from([None, "a", "a", "b"]),
        total_steps=st.sampled_from([100, 200, 300]),
    )
    def submit(self, priority: int, seconds: float | None, key: str | None, total_steps: int) -> str:
        run_at = None if seconds is None else self.clock.now + timedelta(seconds=seconds)
        shape: dict[str, Any] = {"cohort_key": key, "total_steps": total_steps}
        job, _ = submit_job(self.db, NewJob(text="a b", config={}, priority=priority, run_at=run_at, **shape))
        self.before[job.id] = job
        self.submitted.append(job.id)
        return job.id

    @rule(
        target=sweeps,
        priority=st.integers(0, 1),
        steps=st.lists(st.sampled_from([100, 200, 300]), min_size=2, max_size=4),
    )
    def submit_sweep(self, priority: int, steps: list[int]) -> str:
        new = [
            NewJob(text="a b", config={}, priority=priority, cohort_key="a", total_steps=total_steps)
            for total_steps in steps
        ]
        sweep, _ = submit_sweep(self.db, NewSweep(jobs=new, config={}, parameters=[]))
        made = sorted(
            (job for job in reads.list_jobs(self.db, limit=100) if job.sweep_id == sweep.id), key=lambda job: job.seq
        )
        self.before |= {job.id: job for job in made}
        self.submitted += [job.id for job in made]
        return sweep.id

    @rule(sweep_id=sweeps, ask=st.sampled_from(sorted(REQUESTS, key=str)))
    def user_asks_of_a_sweep(self, sweep_id: str, ask: Any) -> None:
        before = {job.id: job for job in self.before.values() if job.sweep_id == sweep_id}
        try:
            ask(self.db, sweep_id)
        except Conflict:
            assert {job.status for job in before.values()}.isdisjoint({"queued", "running", "paused"} | REQUESTS[ask])
            assert all(reads.get_job(self.db, job_id) == job for job_id, job in before.items())
        for job_id, job in before.items():
            now = reads.get_job(self.db, job_id)
            assert now.status == ("running" if job.status == "running" else self.expected(ask, job.status))
            if job.status == "running":  # its worker is told, whoever is in its company
                told = {queue.request_cancel_sweep: now.cancel_requested_at is not None,
                        queue.request_pause_sweep: now.pause_requested_at is not None,
                        queue.resume_sweep: now.pause_requested_at is None}  # fmt: skip
                assert told[ask]

    @staticmethod
    def expected(ask: Any, status: str) -> str:
        """What a request makes at once of a job that does not run."""
        if ask is queue.request_cancel_sweep and status in {"queued", "paused"}:
            return "cancelled"
        if ask is queue.request_pause_sweep and status == "queued":
            return "paused"
        return "queued" if ask is queue.resume_sweep and status == "paused" else status

    @rule(claim=claims, end=st.sampled_from(sorted(ENDS_OF_A_TRAINER)))
    def a_trainer_ends(self, claim: Claim, end: str) -> None:
        """All of its jobs are released, one after the other."""
        cohort_id = claim.job.cohort_id
        members = [one for one in self.claimed if one is claim or (cohort_id and one.job.cohort_id == cohort_id)]
        for one in members:
            row = self.before[one.job_id]
            owns = row.status == "running" and row.fence == one.fence
            try:
                released = ENDS_OF_A_TRAINER[end](self.db, one)
            except LeaseLost:
                assert not owns
                continue
            assert owns
            assert released.crashes == row.crashes + (end == "it dies")
            if end == "it dies":
                assert released.cohort_key is None

    @rule(target=claims, number=st.integers(0, 1))
    def claim(self, number: int) -> Any:
        claimable = [job for job in self.with_status("queued") if self.may_start(job)]
        found = queue.claim(self.db, self.workers[number], LEASE)
        if found is None:
            assert not claimable
            return multiple()
        assert found.job_id == min(claimable, key=lambda job: (-job.priority, self.submitted.index(job.id))).id
        assert found.fence == self.before[found.job_id].fence + 1
        assert found.job.cohort_id is None
        self.claimed.append(found)
        return found

    @rule(target=claims, number=st.integers(0, 1), n=st.integers(2, 4))
    def claim_several(self, number: int, n: int) -> Any:
        claimable = [job for job in self.with_status("queued") if self.may_start(job)]
        in_line = sorted(claimable, key=lambda job: (-job.priority, self.submitted.index(job.id)))
        found = queue.claim_jobs(self.db, self.workers[number], LEASE, n)
        assert [one.job_id for one in found] == [job.id for job in in_line[:n]]
        assert all(one.fence == self.before[one.job_id].fence + 1 for one in found)
        assert all(one.job.cohort_id is None for one in found)
        self.claimed += found
        return multiple(*found)

    @rule(target=claims, number=st.integers(0, 1), n=st.integers(1, 2), width=st.integers(2, 4))
    def claim_cohorts(self, number: int, n: int, width: int) -> Any:
        claimable = [job for job in self.with_status("queued") if self.may_start(job)]
        in_line = sorted(claimable, key=lambda job: (-job.priority, self.submitted.index(job.id)))
        found = queue.claim_cohorts(self.db, self.workers[number], LEASE, n, width)
        for one in found:
            expected = self.cohort(in_line, width)
            forecast = company(self.candidate(in_line[0]), map(self.candidate, in_line[1:]), width, None)
            assert [one.id for one in forecast] == [job.id for job in expected]
            assert [claim.job_id for claim in one] == [job.id for job in expected]
            assert {claim.job.cohort_size for claim in one} == {len(one) if len(one) > 1 else None}
            assert len({claim.job.cohort_id for claim in one}) == 1
            in_line = [job for job in in_line if job not in expected]
        assert len(found) == n or not in_line
        claimed = [claim for one in found for claim in one]
        self.claimed += claimed
        return multiple(*claimed)

    def cohort(self, in_line: list[Job], width: int) -> list[Job]:
        """The first job in line, and those that are claimed with it."""
        first = in_line[0]
        width = min(width, first.cohort_most or width)
        if first.cohort_key is None or not self.may_have_company(first):
            return [first]
        company = [
            job
            for job in in_line[1:]
            if (job.cohort_key, job.priority) == (first.cohort_key, first.priority)
            and self.may_have_company(job)
            and (job.cohort_most or width) >= width
            and self.steps_left(first) <= 2 * self.steps_left(job) <= 4 * self.steps_left(first)
        ]
        return [first, *company][:width]

    def candidate(self, job: Job) -> Candidate:
        return Candidate(
            id=job.id,
            cohort_key=job.cohort_key,
            steps_left=self.steps_left(job),
            priority=job.priority,
            cohort_most=job.cohort_most,
            may_have_company=self.may_have_company(job),
        )

    def may_have_company(self, job: Job) -> bool:
        return job.execution is None  # those of this machine do not say how many threads they have

    def steps_left(self, job: Job) -> int:
        assert job.total_steps is not None
        return max(1, job.total_steps - int(job.progress.get("step", 0)))

    @rule(batch=st.lists(claims, min_size=2, max_size=4, unique_by=id), ends=st.booleans())
    def worker_writes_several(self, batch: list[Claim], ends: bool) -> None:
        owned = [(row := self.before[claim.job_id]).status == "running" and row.fence == claim.fence for claim in batch]
        lost = {claim.job_id for claim in batch} - {
            claim.job_id for claim, owns in zip(batch, owned, strict=True) if owns
        }
        recorded = {job_id: (reads.get_job(self.db, job_id), self.recorded(job_id)) for job_id in lost}
        outcomes: list[Any] = (
            queue.finish_jobs(self.db, [Finish(claim, "succeeded") for claim in batch])
            if ends
            else recording.record_reports(self.db, [Report(claim, STEPS, {"step": claim.fence}) for claim in batch])
        )
        assert [not isinstance(outcome, LeaseLost) for outcome in outcomes] == owned
        for job_id, before in recorded.items():
            assert (reads.get_job(self.db, job_id), self.recorded(job_id)) == before

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
        cohorts: dict[str, list[Job]] = {}
        for job in found.values():
            if job.status == "running" and job.cohort_id is not None:
                cohorts.setdefault(job.cohort_id, []).append(job)
        for members in cohorts.values():
            assert len({(job.worker_id, job.priority, job.cohort_key, job.cohort_size) for job in members}) == 1
            size = members[0].cohort_size
            assert size is not None
            assert len(members) <= size
            assert all(job.cohort_key and (job.cohort_most or size) >= size for job in members)

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
            for rows in (Job, Sweep, Text, Worker):
                session.execute(sa.delete(table(rows)))


def test_no_history_breaks_a_promise(db: Database, clock: Clock) -> None:
    run_state_machine_as_test(
        lambda: Histories(db, clock),
        settings=settings(max_examples=15, stateful_step_count=25, suppress_health_check=list(HealthCheck)),
    )
