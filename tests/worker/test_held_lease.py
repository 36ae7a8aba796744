"""The lease of a claim: what a write does when the database is out of reach, or the job another worker's."""

import threading
import time
from dataclasses import replace

import pytest

from service.database.database import Database
from service.errors import DatabaseUnavailable, LeaseLost
from service.jobs import queue, recording
from service.jobs.lease import Claim
from service.jobs.new_job import NewJob
from service.jobs.workers import WorkerIdentity
from tests.databases import ONLY_SQLITE
from tests.worker.workplace import QUICK
from worker.held_lease import Lease, LeaseUncertain

TIMING = replace(QUICK, retry=0.01)


@pytest.fixture
def claim(db: Database) -> Claim:
    queue.submit(db, NewJob(text="uma frase", config={}))
    claim = queue.claim(db, WorkerIdentity(), 60)
    assert claim is not None
    return claim


@ONLY_SQLITE
def test_a_write_extends_the_lease_from_before_it_began(db: Database, claim: Claim) -> None:
    lease = Lease(claim, time.monotonic() - 10, TIMING)
    before = time.monotonic()
    lease.write(lambda: recording.heartbeat(db, claim))
    assert before + TIMING.kill_after <= lease.deadline <= time.monotonic() + TIMING.kill_after
    assert not lease.is_uncertain


@ONLY_SQLITE
def test_a_write_is_tried_again_while_the_database_is_out_of_reach(db: Database, claim: Claim) -> None:
    failures = iter([DatabaseUnavailable("away"), DatabaseUnavailable("away")])

    def write() -> object:
        for failure in failures:
            raise failure
        return recording.heartbeat(db, claim)

    Lease(claim, time.monotonic(), TIMING).write(write)


@ONLY_SQLITE
def test_a_write_fails_once_the_trainer_was_killed_at_the_deadline(claim: Claim) -> None:
    lease = Lease(claim, time.monotonic(), TIMING)

    def write() -> object:
        lease.fenced.set()
        raise DatabaseUnavailable("away")

    with pytest.raises(LeaseUncertain):
        lease.write(write)


@ONLY_SQLITE
def test_a_write_that_succeeds_after_the_deadline_still_fails_the_lease(db: Database, claim: Claim) -> None:
    lease = Lease(claim, time.monotonic(), TIMING)
    lease.fenced.set()
    with pytest.raises(LeaseUncertain):
        lease.write(lambda: recording.heartbeat(db, claim))


@ONLY_SQLITE
def test_a_job_that_another_worker_may_claim_is_not_written(db: Database, claim: Claim) -> None:
    queue.release(db, claim)
    lease = Lease(claim, time.monotonic(), TIMING)
    for write in (lease.write, lambda write: lease.final_write(write, threading.Event())):
        with pytest.raises(LeaseLost):
            write(lambda: recording.heartbeat(db, claim))


@ONLY_SQLITE
def test_the_final_write_is_aborted_when_the_worker_must_end_at_once(claim: Claim) -> None:
    force_stop = threading.Event()

    def write() -> object:
        force_stop.set()
        raise DatabaseUnavailable("away")

    assert Lease(claim, time.monotonic(), TIMING).final_write(write, force_stop) is None
